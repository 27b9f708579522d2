//! The documents by path, each with an ETag.

use super::crl::Crls;
use crate::config::Outside;
use crate::replica::Replica;
use ambit_identity::document::Published;
use ambit_model::{Code, Refusal};
use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use sha2::{Digest, Sha256};
use std::sync::Arc;

const JSON: &str = "application/json";
/// Caches on the way keep a CRL no longer: revocations are not to wait for them, seconds.
const CRL_AGE_S: u64 = 10;
/// The head is another one with each record, seconds.
const AUDIT_AGE_S: u64 = 1;

#[derive(Clone)]
struct Pages {
    replica: Replica,
    config: Arc<Outside>,
    crls: Arc<Crls>,
}

/// All pages. Another path is not found, another method not allowed.
pub fn router(replica: Replica, config: Outside) -> Router {
    Router::new()
        .route("/", get(bundle).head(only_get))
        .route("/.well-known/openid-configuration", get(discovery).head(only_get))
        .route("/crl/{authority}", get(crl).head(only_get))
        .route("/keys", get(keys).head(only_get))
        .route("/audit/{epoch}/{*path}", get(audit).head(only_get))
        .fallback(|_: Uri| async { (StatusCode::NOT_FOUND, "not found\n") })
        .with_state(Pages { replica, config: Arc::new(config), crls: Arc::default() })
}

async fn only_get() -> Response {
    (StatusCode::METHOD_NOT_ALLOWED, [(header::ALLOW, "GET")]).into_response()
}

async fn bundle(State(pages): State<Pages>, headers: HeaderMap) -> Response {
    pages.answer(&headers, |published| published.bundle())
}

/// OIDC is served where the configuration names the issuer, and tokens carry its URL (`iss`).
async fn discovery(State(pages): State<Pages>, headers: HeaderMap) -> Response {
    let Some(issuer) = pages.config.oidc_issuer.clone() else { return not_served() };
    pages.answer(&headers, move |published| published.oidc_discovery(&issuer))
}

async fn keys(State(pages): State<Pages>, headers: HeaderMap) -> Response {
    if pages.config.oidc_issuer.is_none() {
        return not_served();
    }
    pages.answer(&headers, |published| published.oidc_keys())
}

/// The CRL of an issuing authority, by its key identifier in hexadecimal digits.
async fn crl(State(pages): State<Pages>, Path(authority): Path<String>, headers: HeaderMap) -> Response {
    match pages.crls.of(&pages.replica, &authority).await {
        Ok(der) => conditional(&headers, &der, CRL_AGE_S, "application/pkix-crl"),
        Err(refusal) if refusal.code == Code::NotFound => not_served(),
        Err(refusal) => {
            tracing::warn!(%refusal, authority, "a CRL cannot be served");
            (StatusCode::SERVICE_UNAVAILABLE, "unavailable\n").into_response()
        }
    }
}

async fn audit(
    State(pages): State<Pages>,
    Path((epoch, path)): Path<(String, String)>,
    headers: HeaderMap,
) -> Response {
    if !pages.config.audit {
        return not_served();
    }
    match super::audit::page(&pages.replica, &epoch, &path) {
        Ok((body, kind)) => conditional(&headers, &body, AUDIT_AGE_S, kind),
        Err(refusal) if matches!(refusal.code, Code::NotFound | Code::AuditNotBegun) => not_served(),
        Err(refusal) => {
            tracing::warn!(%refusal, path, "the audit log cannot be served");
            (StatusCode::SERVICE_UNAVAILABLE, "unavailable\n").into_response()
        }
    }
}

fn not_served() -> Response {
    (StatusCode::NOT_FOUND, "not found\n").into_response()
}

impl Pages {
    fn answer(&self, headers: &HeaderMap, write: impl FnOnce(&Published<'_>) -> Result<String, Refusal>) -> Response {
        let own = self.replica.trust_domain();
        // Of one state: the sequence is that of roots and keys together.
        let found = self.replica.local(|s| {
            let jwt_keys = s.jwt_bundles().remove(own).unwrap_or_default();
            s.bundles().remove(own).map(|(sequence, roots)| (sequence, roots, jwt_keys))
        });
        let Some((sequence, roots, jwt_keys)) = found else {
            // A joiner before its first entry knows no bundle, and an empty one would mean that all is revoked.
            return (StatusCode::SERVICE_UNAVAILABLE, "no bundle yet\n").into_response();
        };
        let refresh_hint_s = self.config.refresh_hint_s;
        let published = Published { sequence, refresh_hint_s, roots: &roots, jwt_keys: &jwt_keys };
        match write(&published) {
            Ok(body) => conditional(headers, body.as_bytes(), refresh_hint_s, JSON),
            Err(refusal) => {
                tracing::error!(%refusal, "a document for outsiders cannot be written");
                (StatusCode::INTERNAL_SERVER_ERROR, "unavailable\n").into_response()
            }
        }
    }
}

/// The document, or only that it is still the one that the caller has (RFC 9110 section 13.1.2).
fn conditional(headers: &HeaderMap, body: &[u8], max_age_s: u64, kind: &'static str) -> Response {
    let etag = etag(body);
    let cache = format!("public, max-age={max_age_s}");
    let head = [(header::ETAG, etag.clone()), (header::CACHE_CONTROL, cache)];
    if has(headers, &etag) {
        return (StatusCode::NOT_MODIFIED, head).into_response();
    }
    (StatusCode::OK, head, [(header::CONTENT_TYPE, kind)], body.to_vec()).into_response()
}

fn etag(body: &[u8]) -> String {
    let digest: [u8; 32] = Sha256::digest(body).into();
    format!("\"{}\"", hex::encode(&digest[..16]))
}

/// Whether one of the tags that the caller names is this one. Compared weakly (RFC 9110 section 8.8.3.2).
fn has(headers: &HeaderMap, etag: &str) -> bool {
    let named = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
    let mut tags = named.flat_map(|value| value.split(',')).map(str::trim);
    tags.any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == etag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_caller_has_already_is_not_sent_again() {
        let tag = etag(b"body");
        for (value, known) in [
            (tag.clone(), true),
            (format!("W/{tag}"), true),
            (format!("\"other\", {tag}"), true),
            ("*".to_owned(), true),
            ("\"other\"".to_owned(), false),
            (tag.trim_matches('"').to_owned(), false),
            (String::new(), false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::IF_NONE_MATCH, value.parse().unwrap());
            let status = if known { StatusCode::NOT_MODIFIED } else { StatusCode::OK };
            assert_eq!(conditional(&headers, b"body", 300, JSON).status(), status, "{value}");
        }
        assert_eq!(conditional(&HeaderMap::new(), b"body", 300, JSON).status(), StatusCode::OK);
    }
}
