//! Who made a TPM, as its EK certificate says (TCG EK Credential Profile 2.x, 3.2.9: a directoryName in the subject
//! alternative name, which is critical where the subject is empty).

use ambit_model::{Code, Refusal};
use std::fmt;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::X509Certificate;
use x509_parser::x509::X509Name;

const OID_MANUFACTURER: &str = "2.23.133.2.1";
const OID_MODEL: &str = "2.23.133.2.2";
/// Longest manufacturer or model kept, in bytes: the profile's own names have at most 32.
pub(crate) const NAME_BYTES_MAX: usize = 64;

/// Maker and model of a TPM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EkMake {
    /// As the certificate says.
    Named {
        /// TCG vendor id: `id:` and eight hexadecimal digits in upper case.
        manufacturer: String,
        /// Model; empty where it names none.
        model: String,
    },
    /// No certificate, or one that names no maker.
    Unnamed,
    /// A certificate whose names are none that the profile knows.
    Unreadable,
}

impl EkMake {
    /// The TCG vendor id for `id:49465800` in any case of digits, or for the short name that it spells (`IFX`).
    pub fn vendor_id(text: &str) -> Result<String, Refusal> {
        let bad = || Refusal::new(Code::BadRequest, "a TCG vendor id (id:49465800, or IFX)", text);
        match text.strip_prefix("id:") {
            Some(digits) if digits.len() == 8 && digits.bytes().all(|b| b.is_ascii_hexdigit()) => {
                Ok(format!("id:{}", digits.to_ascii_uppercase()))
            }
            None if (1..=4).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic()) => {
                let mut id: String = "id:".into();
                for n in 0..4 {
                    id.push_str(&format!("{:02X}", text.as_bytes().get(n).copied().unwrap_or(0)));
                }
                Ok(id)
            }
            Some(_) | None => Err(bad()),
        }
    }

    /// The vendor id, or nothing.
    pub fn manufacturer(&self) -> &str {
        match self {
            EkMake::Named { manufacturer, .. } => manufacturer,
            EkMake::Unnamed | EkMake::Unreadable => "",
        }
    }

    /// The model, or nothing.
    pub fn model(&self) -> &str {
        match self {
            EkMake::Named { model, .. } => model,
            EkMake::Unnamed | EkMake::Unreadable => "",
        }
    }

    /// Reads the subject alternative name; certificates without one may carry the names in their subject.
    pub(super) fn of(certificate: &X509Certificate<'_>) -> EkMake {
        let mut names = Vec::new();
        for extension in certificate.extensions() {
            match extension.parsed_extension() {
                ParsedExtension::SubjectAlternativeName(san) => {
                    names.extend(san.general_names.iter().filter_map(|name| match name {
                        GeneralName::DirectoryName(name) => Some(name),
                        _ => None,
                    }));
                }
                ParsedExtension::ParseError { .. } if extension.oid == SUBJECT_ALT_NAME => return EkMake::Unreadable,
                _ => {}
            }
        }
        names.push(certificate.subject());
        let named = names.into_iter().find_map(|name| Some((attribute(name, OID_MANUFACTURER)?, name)));
        let Some((manufacturer, name)) = named else { return EkMake::Unnamed };
        let model = attribute(name, OID_MODEL).unwrap_or(Some(""));
        match (manufacturer.map(EkMake::vendor_id), model) {
            (Some(Ok(manufacturer)), Some(model)) if model.len() <= NAME_BYTES_MAX => {
                EkMake::Named { manufacturer, model: model.to_owned() }
            }
            _ => EkMake::Unreadable,
        }
    }
}

const SUBJECT_ALT_NAME: x509_parser::der_parser::Oid<'static> =
    x509_parser::oid_registry::OID_X509_EXT_SUBJECT_ALT_NAME;

/// The attribute of this type, wherever in the name it stands: makers write one set of three or three sets of one.
/// Within: none where its value is no text, or where there are two.
fn attribute<'a>(name: &'a X509Name<'_>, oid: &str) -> Option<Option<&'a str>> {
    let mut found = name.iter_attributes().filter(|a| a.attr_type().to_id_string() == oid);
    let first = found.next()?;
    let only = found.next().is_none();
    Some(first.as_str().ok().filter(|_| only))
}

impl fmt::Display for EkMake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EkMake::Named { manufacturer, model } => write!(f, "{manufacturer} {model}"),
            EkMake::Unnamed => f.write_str("a TPM of no named maker"),
            EkMake::Unreadable => f.write_str("a TPM whose maker cannot be read"),
        }
    }
}
