//! Parses a JSON value as a request: a call, a batch of calls, or an invalid request.

use std::fmt;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// A JSON value from a client.
#[derive(Debug)]
pub(crate) enum Request {
    /// One member. A value that is neither object nor array, and an empty batch, is an invalid one.
    Single(Member),
    /// A JSON array with at least one member.
    Batch(Vec<Member>),
}

/// One request object.
#[derive(Debug)]
pub(crate) struct Member {
    /// The id, which the answer repeats. `None` for a notification, and for invalid requests whose
    /// id SPDK does not read.
    pub(crate) id: Option<Id>,
    /// The call. `None` if the member is not a valid request.
    pub(crate) call: Option<Call>,
}

/// A valid request object without its id.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) method: String,
    /// An object or an array.
    pub(crate) params: Option<Box<RawValue>>,
}

/// A request's id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Id {
    /// The number's text: `1.50` stays `1.50` in the answer.
    Number(Box<str>),
    /// The decoded string: the answer encodes it in ASCII.
    Text(String),
}

impl Request {
    /// Parses one JSON value. Fails if `text` is not a JSON value.
    pub(crate) fn parse(text: &str) -> Result<Self, serde_json::Error> {
        let text = text.trim_ascii();
        if !text.starts_with('[') {
            return Ok(Self::Single(Member::parse(text)?));
        }
        let members: Vec<&RawValue> = serde_json::from_str(text)?;
        if members.is_empty() {
            return Ok(Self::Single(Member::invalid(None)));
        }
        let members: Result<_, _> = members.iter().map(|raw| Member::parse(raw.get())).collect();
        Ok(Self::Batch(members?))
    }
}

impl Member {
    fn invalid(id: Option<Id>) -> Self {
        Self { id, call: None }
    }

    /// SPDK checks the keys, the version and the method before it reads the id. So the answer to an
    /// error in those has no id, and only the answer to an error in `params` has one.
    fn parse(text: &str) -> Result<Self, serde_json::Error> {
        if !text.starts_with('{') {
            return Ok(Self::invalid(None));
        }
        let (mut version, mut method, mut params, mut id) = (None, None, None, None);
        for (name, value) in members(text)? {
            let field = match name.as_str() {
                "jsonrpc" => &mut version,
                "method" => &mut method,
                "params" => &mut params,
                "id" => &mut id,
                _ => return Ok(Self::invalid(None)),
            };
            if field.replace(value).is_some() {
                return Ok(Self::invalid(None));
            }
        }
        if version.is_some_and(|raw| string(raw).as_deref() != Some("2.0")) {
            return Ok(Self::invalid(None));
        }
        let Some(method) = method.and_then(string) else { return Ok(Self::invalid(None)) };
        let id = match id.map(|raw| (raw, raw.get().as_bytes()[0])) {
            None | Some((_, b'n')) => None,
            Some((raw, b'-' | b'0'..=b'9')) => Some(Id::Number(raw.get().into())),
            Some((raw, b'"')) => string(raw).map(Id::Text),
            Some(_) => return Ok(Self::invalid(None)),
        };
        let params = match params.map(|raw| (raw, raw.get().as_bytes()[0])) {
            None | Some((_, b'n')) => None,
            Some((raw, b'{' | b'[')) => Some(raw.to_owned()),
            Some(_) => return Ok(Self::invalid(id)),
        };
        Ok(Self { id, call: Some(Call { method, params }) })
    }
}

fn string(raw: &RawValue) -> Option<String> {
    serde_json::from_str(raw.get()).ok()
}

/// The members of the JSON object `text` in order, with repeated names.
pub(crate) fn members(text: &str) -> Result<Vec<(String, &RawValue)>, serde_json::Error> {
    struct Members;
    impl<'de> Visitor<'de> for Members {
        type Value = Vec<(String, &'de RawValue)>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut members = Vec::new();
            while let Some(member) = map.next_entry()? {
                members.push(member);
            }
            Ok(members)
        }
    }
    let mut json = serde_json::Deserializer::from_str(text);
    let members = (&mut json).deserialize_map(Members)?;
    json.end()?;
    Ok(members)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn single(text: &str) -> Member {
        match Request::parse(text) {
            Ok(Request::Single(member)) => member,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn valid_requests() {
        let member = single(r#"{"jsonrpc":"2.0","method":"m","id":1.50,"params":{"a":[1]}}"#);
        assert_eq!(member.id, Some(Id::Number("1.50".into())));
        let call = member.call.unwrap();
        assert_eq!(call.method, "m");
        assert_eq!(call.params.unwrap().get(), r#"{"a":[1]}"#);

        let member = single(r#"{"method":"m","id":"\u00e9","params":null}"#);
        assert_eq!(member.id, Some(Id::Text("é".into())));
        assert!(member.call.unwrap().params.is_none());

        let member = single(r#"{"method":"m","id":null}"#);
        assert!(member.id.is_none() && member.call.is_some());
    }

    #[test]
    fn errors_lose_the_id_except_in_params() {
        for text in [
            "5 ",
            "\"x\"",
            "[]",
            r#"{"id":1}"#,
            r#"{"method":5,"id":1}"#,
            r#"{"method":"m","id":1,"extra":0}"#,
            r#"{"method":"m","id":1,"id":1}"#,
            r#"{"jsonrpc":"1.0","method":"m","id":1}"#,
            r#"{"jsonrpc":2.0,"method":"m","id":1}"#,
            r#"{"method":"m","id":true}"#,
            r#"{"method":"m","id":[1]}"#,
            r#"{"method":"m","id":{}}"#,
        ] {
            let member = single(text);
            assert!(member.call.is_none() && member.id.is_none(), "{text}");
        }
        let member = single(r#"{"method":"m","id":7,"params":5}"#);
        assert!(member.call.is_none());
        assert_eq!(member.id, Some(Id::Number("7".into())));
    }

    #[test]
    fn a_batch_keeps_its_invalid_members() {
        let Ok(Request::Batch(members)) = Request::parse(r#"[1,{"method":"m","id":2},[]]"#) else {
            panic!("no batch");
        };
        let valid: Vec<bool> = members.iter().map(|member| member.call.is_some()).collect();
        assert_eq!(valid, [false, true, false]);
    }
}
