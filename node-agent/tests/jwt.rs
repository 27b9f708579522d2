//! JWT-SVIDs over the Workload API, as the `spiffe` crate and py-spiffe see them, and what the agent keeps of them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::clock::Clock;
use ambit_agent::issued::Issued;
use ambit_agent::tokens::Tokens;
use ambit_model::Code as Why;
use ambit_proto::v1;
use ambit_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use ambit_proto::workload::{JwtsvidRequest, JwtsvidResponse, ValidateJwtsvidRequest, ValidateJwtsvidResponse};
use spiffe::{TrustDomain, WorkloadApiClient};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use support::Cell;
use support::issuer::{Does, Issuer, Served};
use support::local::{Socket, call, interop, uid};
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

/// A node of west whose workload is this process, `me` and `two` by entry, federated with east.
struct Stage {
    served: Served,
    east: Cell,
    /// A peer of the cell with which no entry federates.
    north: Cell,
    slice: v1::Slice,
    issued: Issued,
    cell: watch::Sender<Option<Channel>>,
    socket: Socket,
}

async fn stage() -> Stage {
    let (mut west, mut east, mut north) =
        (Cell::founded("west", 1), Cell::founded("east", 2), Cell::founded("north", 3));
    for cell in [&mut west, &mut east, &mut north] {
        cell.jwt_authority();
        cell.entry("peer", &["unix:uid:424242"], &[]);
    }
    let entries = vec![west.entry("me", &[&uid()], &["east"]), west.entry("two", &[&uid()], &[])];
    let slice = v1::Slice { entries, ..west.slice(1, &[&east, &north]) };
    let issued = Issued::default();
    issued.set_view(west.view(slice.clone()));
    let served = Issuer::serve(west).await;
    let (cell, channel) = watch::channel(Some(served.channel.clone()));
    let socket = Socket::with("jwt", &issued, Tokens::new(channel, Arc::new(Clock::default())));
    Stage { served, east, north, slice, issued, cell, socket }
}

impl Stage {
    async fn fetch(&self, audience: &[&str], spiffe_id: &str) -> Result<JwtsvidResponse, Status> {
        let audience = audience.iter().map(|one| (*one).to_owned()).collect();
        let mut request = Request::new(JwtsvidRequest { audience, spiffe_id: spiffe_id.into() });
        request.metadata_mut().insert("workload.spiffe.io", "true".parse().unwrap());
        let mut client = SpiffeWorkloadApiClient::new(self.socket.channel().await);
        client.fetch_jwtsvid(request).await.map(tonic::Response::into_inner)
    }
    /// The token of `me` for an audience, or the code.
    async fn mine(&self, audience: &str) -> Result<String, Code> {
        let answer = self.fetch(&[audience], "spiffe://west/me").await.map_err(|status| status.code())?;
        assert_eq!(answer.svids.len(), 1);
        Ok(answer.svids[0].svid.clone())
    }
    async fn validate(&self, audience: &str, svid: &str) -> Result<ValidateJwtsvidResponse, Status> {
        let mut request = Request::new(ValidateJwtsvidRequest { audience: audience.into(), svid: svid.into() });
        request.metadata_mut().insert("workload.spiffe.io", "true".parse().unwrap());
        let mut client = SpiffeWorkloadApiClient::new(self.socket.channel().await);
        client.validate_jwtsvid(request).await.map(tonic::Response::into_inner)
    }
}

#[tokio::test]
async fn the_spiffe_crate_fetches_tokens_and_their_keys_and_has_them_judged() {
    let stage = stage().await;
    let client = WorkloadApiClient::connect_to(stage.socket.endpoint()).await.unwrap();
    let token = client.fetch_jwt_svid(["audience"], None).await.unwrap();
    assert_eq!(token.spiffe_id().to_string(), "spiffe://west/me");
    assert_eq!(token.audience(), ["audience"]);
    let bundles = client.fetch_jwt_bundles().await.unwrap();
    for (td, known) in [("west", true), ("east", true), ("north", false)] {
        let found = bundles.get(&TrustDomain::new(td).unwrap());
        assert_eq!(found.is_some(), known, "{td}");
        assert!(found.is_none_or(|bundle| bundle.jwt_authorities().count() == 1));
    }
    let west = bundles.get(&TrustDomain::new("west").unwrap()).unwrap();
    assert!(west.find_jwt_authority(token.key_id()).is_some());
    let judged = client.validate_jwt_token("audience", token.token()).await.unwrap();
    assert_eq!(judged.spiffe_id().to_string(), "spiffe://west/me");
    assert!(client.validate_jwt_token("another", token.token()).await.is_err());
}

const PY_SPIFFE: &str = r#"
import sys
from spiffe import JwtSvid, SpiffeId, WorkloadApiClient
with WorkloadApiClient(sys.argv[1]) as client:
    token = client.fetch_jwt_svid(audience={"a", "b"}, subject=SpiffeId("spiffe://west/two")).token
    bundles = client.fetch_jwt_bundles()
    bundle = next(one for one in bundles.bundles if str(one.trust_domain) == "west")
    # Judged by PyJWT with the keys that were told, not by us.
    svid = JwtSvid.parse_and_validate(token, bundle, {"a"})
    print(svid.spiffe_id, sorted(svid.audience), client.validate_jwt_svid(token, "b").spiffe_id)
    other = next(one for one in bundles.bundles if str(one.trust_domain) == "east")
    for audience, by in [({"c"}, bundle), ({"a"}, other)]:
        try:
            JwtSvid.parse_and_validate(token, by, audience)
        except Exception as error:
            print("refused")
    # A token of the other trust domain, by its keys and no others; and one of a third, whose keys are told to nobody here.
    theirs, thirds = sys.argv[2:4]
    print(JwtSvid.parse_and_validate(theirs, other, {"me"}).spiffe_id, client.validate_jwt_svid(theirs, "me").spiffe_id)
    print(sorted(str(one.trust_domain) for one in bundles.bundles))
    for judge in [lambda: JwtSvid.parse_and_validate(theirs, bundle, {"me"}), lambda: client.validate_jwt_svid(theirs, "you"),
                  lambda: client.validate_jwt_svid(thirds, "me")]:
        try:
            judge()
        except Exception as error:
            print("refused")
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn py_spiffe_verifies_a_token_with_the_keys_that_it_is_told() {
    let mut stage = stage().await;
    let mut python = Command::new(interop("python"));
    python.args(["-c", PY_SPIFFE]).arg(format!("unix://{}", stage.socket.path().display()));
    for cell in [&mut stage.east, &mut stage.north] {
        python.arg(cell.token("peer", &["me".into()]).unwrap());
    }
    let done = python.output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let said = String::from_utf8(done.stdout).unwrap();
    let lines = [
        "spiffe://west/two ['a', 'b'] spiffe://west/two",
        "refused",
        "refused",
        "spiffe://east/peer spiffe://east/peer",
        "['east', 'west']",
        "refused",
        "refused",
        "refused",
    ];
    assert_eq!(said.lines().collect::<Vec<_>>(), lines);
}

#[tokio::test]
async fn a_token_is_for_an_own_identity_and_an_audience() {
    let mut stage = stage().await;
    stage.slice.entries[1].hint = "second".into();
    stage.issued.set_view(stage.served.issuer.with(|west| west.view(stage.slice.clone())));
    let all = stage.fetch(&["a"], "").await.unwrap();
    let all: Vec<_> = all.svids.iter().map(|svid| (svid.spiffe_id.as_str(), svid.hint.as_str())).collect();
    assert_eq!(all, [("spiffe://west/me", ""), ("spiffe://west/two", "second")]);
    let one = stage.fetch(&["a"], "spiffe://west/two").await.unwrap();
    assert_eq!(one.svids.len(), 1);
    let many: Vec<String> = (0..17).map(|n| format!("a{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    for (audience, id, code) in [
        (&[][..], "", Code::InvalidArgument),
        (&[""], "", Code::InvalidArgument),
        (&["a", "a"], "", Code::InvalidArgument),
        (&many, "", Code::InvalidArgument),
        (&["a"], "west/me", Code::InvalidArgument),
        (&["a"], "spiffe://west/peer", Code::PermissionDenied),
        (&["a"], "spiffe://east/me", Code::PermissionDenied),
    ] {
        assert_eq!(stage.fetch(audience, id).await.unwrap_err().code(), code, "{audience:?} {id}");
    }
    stage
        .issued
        .set_view(stage.served.issuer.with(|west| west.view(v1::Slice { entries: vec![], ..stage.slice.clone() })));
    assert_eq!(stage.fetch(&["a"], "").await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(stage.validate("a", "x").await.unwrap_err().code(), Code::PermissionDenied);
    let mut bundles = call(stage.socket.channel().await, "/SpiffeWorkloadAPI/FetchJWTBundles").await.unwrap();
    assert_eq!(bundles.message().await.unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test]
async fn a_token_is_kept_while_it_is_good_and_no_longer() {
    let stage = stage().await;
    let issuer = &stage.served.issuer;
    let first = stage.mine("a").await.unwrap();
    assert_eq!((stage.mine("a").await.unwrap(), issuer.asked()), (first.clone(), 1));
    assert_ne!(stage.mine("b").await.unwrap(), first);
    assert_eq!(issuer.asked(), 1);

    // The cell is away: what is kept is told, and nothing else.
    stage.cell.send_replace(None);
    assert_eq!(stage.mine("a").await, Ok(first.clone()));
    assert_eq!(stage.mine("c").await, Err(Code::Unavailable));
    stage.cell.send_replace(Some(stage.served.channel.clone()));
    issuer.does(Does::Refuse(Why::NodeLate));
    assert_eq!(stage.mine("c").await, Err(Code::Unavailable));
    issuer.does(Does::Refuse(Why::EntryNotOnNode));
    assert_eq!(stage.mine("c").await, Err(Code::PermissionDenied));

    // A cell that says something else than it was asked is not believed.
    let (others, theirs) = issuer.with(|west| (west.token("two", &["c".into()]), west.token("me", &["d".into()])));
    let wider = issuer.with(|west| west.token("me", &["c".into(), "d".into()]));
    for lie in [others.unwrap(), theirs.unwrap(), wider.unwrap(), "nonsense".into(), String::new()] {
        issuer.does(Does::Lie(lie.clone()));
        assert!(stage.mine("c").await.is_err(), "{lie}");
    }
    issuer.does(Does::Answer);
    assert!(stage.mine("c").await.is_ok());

    // The key that signed it is no longer in the bundle.
    let mut slice = v1::Slice { revision: 2, ..stage.slice.clone() };
    slice.bundles[0].jwt_authorities.clear();
    stage.issued.set_view(issuer.with(|west| west.view(slice)));
    assert!(stage.mine("a").await.is_err());
    stage.issued.set_view(issuer.with(|west| west.view(stage.slice.clone())));
    // The entry has another identity now.
    let mut slice = v1::Slice { revision: 4, ..stage.slice.clone() };
    slice.entries[0].spiffe_id = "spiffe://west/renamed".into();
    stage.issued.set_view(issuer.with(|west| west.view(slice)));
    assert!(stage.fetch(&["a"], "spiffe://west/renamed").await.is_err(), "the cell still says the former");
    assert_eq!(stage.mine("a").await, Err(Code::PermissionDenied));
}

#[tokio::test]
async fn what_a_tainted_key_signed_is_asked_for_anew_and_told_only_while_the_cell_is_away() {
    let stage = stage().await;
    let issuer = &stage.served.issuer;
    let first = stage.mine("a").await.unwrap();
    let (bundle, tainted) = issuer.with(|west| {
        west.taint_jwt();
        (west.bundle(), west.tainted_jwt())
    });
    assert_eq!((bundle.jwt_authorities.len(), tainted.len()), (2, 1));
    let mut slice = v1::Slice { revision: 2, tainted_jwt_authorities: tainted, ..stage.slice.clone() };
    slice.bundles[0] = bundle;
    stage.issued.set_view(issuer.with(|west| west.view(slice.clone())));
    stage.cell.send_replace(None);
    assert_eq!(stage.mine("a").await, Ok(first.clone()), "valid still, and better than none");
    stage.cell.send_replace(Some(stage.served.channel.clone()));
    issuer.asked();
    let second = stage.mine("a").await.unwrap();
    assert_ne!(second, first);
    assert_eq!((stage.mine("a").await, issuer.asked()), (Ok(second), 1), "kept again");

    // Revoked: whoever holds the first one is refused with it.
    assert!(stage.validate("a", &first).await.is_ok());
    slice.bundles[0].jwt_authorities.remove(0);
    let slice = v1::Slice { revision: 3, tainted_jwt_authorities: vec![], ..slice };
    stage.issued.set_view(issuer.with(|west| west.view(slice)));
    assert_eq!(stage.validate("a", &first).await.unwrap_err().code(), Code::InvalidArgument);
    assert!(stage.mine("a").await.is_ok());
}

#[tokio::test]
async fn one_that_asks_for_ever_new_audiences_is_stopped() {
    let stage = stage().await;
    let mut told = 0;
    for n in 0..120 {
        match stage.mine(&format!("audience-{n}")).await {
            Ok(_) => told += 1,
            Err(code) => {
                assert_eq!(code, Code::Unavailable);
                break;
            }
        }
    }
    assert!((50..110).contains(&told), "{told}");
    // The other identity has its own budget, and what is kept costs nothing.
    assert!(stage.fetch(&["a"], "spiffe://west/two").await.is_ok());
    assert!(stage.mine("audience-0").await.is_ok());
}

#[tokio::test]
async fn what_others_present_is_judged_by_the_bundle_of_their_trust_domain() {
    let mut stage = stage().await;
    let good = stage.mine("me").await.unwrap();
    let theirs = stage.east.token("peer", &["me".into()]).unwrap();
    let north = stage.north.token("peer", &["me".into()]).unwrap();
    let judged = stage.validate("me", &good).await.unwrap();
    assert_eq!(judged.spiffe_id, "spiffe://west/me");
    let claims = judged.claims.unwrap().fields;
    let text = |kind: &str| prost_types::value::Kind::StringValue(kind.into());
    assert_eq!(claims["sub"].kind, Some(text("spiffe://west/me")));
    assert!(matches!(claims["exp"].kind, Some(prost_types::value::Kind::NumberValue(at)) if at > 1.7e9));
    let Some(prost_types::value::Kind::ListValue(aud)) = &claims["aud"].kind else { panic!("{claims:?}") };
    assert_eq!(aud.values.iter().map(|one| one.kind.clone()).collect::<Vec<_>>(), [Some(text("me"))]);
    assert_eq!(stage.validate("me", &theirs).await.unwrap().spiffe_id, "spiffe://east/peer");
    // The very signature of one trust domain under the claims of another.
    let spliced = format!("{}.{}", good.rsplit_once('.').unwrap().0, theirs.rsplit_once('.').unwrap().1);
    for (case, audience, token) in [
        ("another audience", "you", good.as_str()),
        ("no bundle", "me", &north),
        ("another's signature", "me", &spliced),
        ("nonsense", "me", "a.b.c"),
        ("no audience", "", &good),
        ("nothing", "me", ""),
    ] {
        assert_eq!(stage.validate(audience, token).await.unwrap_err().code(), Code::InvalidArgument, "{case}");
    }
}

#[tokio::test]
async fn a_new_key_is_told_though_no_svid_changed_and_wakes_no_other_stream() {
    let stage = stage().await;
    let held = stage.served.issuer.with(|west| west.svid("me"));
    stage.issued.set_svids([("me".parse().unwrap(), Ok(held.clone())), ("two".parse().unwrap(), Ok(held))].into());
    let mut keys = call(stage.socket.channel().await, "/SpiffeWorkloadAPI/FetchJWTBundles").await.unwrap();
    let mut svids = call(stage.socket.channel().await, "/SpiffeWorkloadAPI/FetchX509SVID").await.unwrap();
    let (first, _) = (keys.message().await.unwrap().unwrap(), svids.message().await.unwrap().unwrap());
    let mut slice = v1::Slice { revision: 2, ..stage.slice.clone() };
    slice.bundles[0] = stage.served.issuer.with(|west| {
        west.jwt_authority();
        west.bundle()
    });
    assert_eq!(slice.bundles[0].jwt_authorities.len(), 2);
    stage.issued.set_view(stage.served.issuer.with(|west| west.view(slice)));
    let second = tokio::time::timeout(Duration::from_secs(10), keys.message()).await.unwrap().unwrap().unwrap();
    assert_ne!(first, second);
    assert!(tokio::time::timeout(Duration::from_millis(300), svids.message()).await.is_err());
}
