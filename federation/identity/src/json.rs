//! JSON from strangers.

use serde::de::{DeserializeOwned, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use std::fmt;

/// A JSON value in which no object, however deep, has a key twice: two readers must not read two documents. (How deep it
/// may be serde_json bounds.)
pub(crate) struct Once(pub(crate) Value);

/// Reads a document of that kind into `T`.
pub(crate) fn once<T: DeserializeOwned>(json: &[u8]) -> Result<T, serde_json::Error> {
    serde_json::from_slice(json).and_then(|Once(value)| serde_json::from_value(value))
}

impl<'de> Deserialize<'de> for Once {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Once;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("JSON")
            }
            fn visit_unit<E>(self) -> Result<Once, E> {
                Ok(Once(Value::Null))
            }
            fn visit_bool<E>(self, value: bool) -> Result<Once, E> {
                Ok(Once(value.into()))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Once, E> {
                Ok(Once(value.into()))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Once, E> {
                Ok(Once(value.into()))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Once, E> {
                Ok(Once(value.into()))
            }
            fn visit_str<E>(self, value: &str) -> Result<Once, E> {
                Ok(Once(value.into()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Once, A::Error> {
                let mut out = Vec::new();
                while let Some(Once(value)) = seq.next_element()? {
                    out.push(value);
                }
                Ok(Once(out.into()))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Once, A::Error> {
                let mut out = Map::new();
                while let Some((key, Once(value))) = map.next_entry::<String, Once>()? {
                    if out.contains_key(&key) {
                        return Err(A::Error::custom(format!("'{key}' twice")));
                    }
                    out.insert(key, value);
                }
                Ok(Once(out.into()))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_comes_twice_is_refused_at_any_depth_and_all_else_is_read_as_it_is() {
        for (text, good) in [
            (r#"{"a":1,"b":[1,-2,3.5,"x",null,true,{"a":{"b":[]}}],"c":{"a":1}}"#, true),
            (r#"[{"a":1},{"a":2}]"#, true),
            (r#"18446744073709551615"#, true),
            (r#"{"a":1,"a":1}"#, false),
            (r#"{"a":1,"\u0061":1}"#, false),
            (r#"{"x":{"a":1,"a":2}}"#, false),
            (r#"{"keys":[{"kid":"a"},{"kid":"b","kid":"c"}]}"#, false),
            (r#"[[{"x":[{"a":null,"a":null}]}]]"#, false),
            (r#"{"a":1} {}"#, false),
        ] {
            let plain: Result<Value, _> = serde_json::from_str(text);
            assert_eq!(once::<Value>(text.as_bytes()).ok(), plain.ok().filter(|_| good), "{text}");
        }
        assert!(once::<Map<String, Value>>(b"[]").is_err(), "no object");
        for (key, good) in [(r#""use":"other""#, true), (r#""use":"other","use":"another""#, false)] {
            let document = format!(r#"{{"keys":[{{"kty":"EC",{key}}}]}}"#);
            assert_eq!(crate::bundle::document(&document).is_ok(), good, "{document}");
        }
    }
}
