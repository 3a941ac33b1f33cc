//! Parses a configuration file: JSON with C comments, as a flat list of calls.

use serde_json::{Map, Value};
use tracing::warn;

use super::{Call, Place};

/// Why a file is not a configuration.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SyntaxError {
    #[error("not UTF-8: {0}")]
    Utf8(#[from] std::string::FromUtf8Error),
    #[error("not JSON: {0}")]
    Json(#[from] serde_json::Error),
    #[error("unterminated comment")]
    UnterminatedComment,
    #[error("expected an object with \"subsystems\"")]
    NoObject,
    #[error("\"subsystems\" is not a list")]
    NoSubsystemList,
    #[error("an element of \"subsystems\" has no name, a string \"subsystem\"")]
    NoSubsystemName,
    #[error("subsystem {0}: \"config\" is neither a list nor null")]
    NoConfigList(String),
    /// The text names the member's place.
    #[error("{0} is not an object")]
    NotAnObject(String),
    #[error("{place}: unknown member {name:?}")]
    UnknownMember { place: String, name: String },
    #[error("{0}: no \"method\"")]
    NoMethod(String),
    #[error("{place}, {method}: \"params\" is not an object")]
    ParamsNotAnObject { place: String, method: String },
}

/// The calls of a file, in the file's order.
pub(super) fn parse(text: &str) -> Result<Vec<Call>, SyntaxError> {
    let text = without_comments(text)?;
    let Value::Object(mut root) = serde_json::from_str(&text)? else {
        return Err(SyntaxError::NoObject);
    };
    let Some(subsystems) = root.remove("subsystems") else {
        warn!("the configuration has no \"subsystems\" and is ignored");
        return Ok(vec![]);
    };
    let Value::Array(subsystems) = subsystems else {
        return Err(SyntaxError::NoSubsystemList);
    };
    let mut calls = vec![];
    for subsystem in subsystems {
        parse_subsystem(subsystem, &mut calls)?;
    }
    Ok(calls)
}

fn parse_subsystem(subsystem: Value, calls: &mut Vec<Call>) -> Result<(), SyntaxError> {
    let mut members = object(subsystem, "an element of \"subsystems\"")?;
    let Some(Value::String(name)) = members.remove("subsystem") else {
        return Err(SyntaxError::NoSubsystemName);
    };
    let config = members.remove("config");
    expect_no_more(&members, || format!("subsystem {name}"))?;
    let entries = match config {
        Some(Value::Array(entries)) => entries,
        Some(Value::Null) => vec![],
        _ => return Err(SyntaxError::NoConfigList(name)),
    };
    for (n, entry) in entries.into_iter().enumerate() {
        let batch = match entry {
            Value::Array(batch) => batch,
            entry => vec![entry],
        };
        for call in batch {
            calls.push(parse_call(call, &name, n + 1)?);
        }
    }
    Ok(())
}

fn parse_call(call: Value, subsystem: &str, entry: usize) -> Result<Call, SyntaxError> {
    let place = format!("subsystem {subsystem}, entry {entry}");
    let mut members = object(call, &place)?;
    let Some(Value::String(method)) = members.remove("method") else {
        return Err(SyntaxError::NoMethod(place));
    };
    let params = members.remove("params");
    expect_no_more(&members, || format!("{place}, {method}"))?;
    if !matches!(params, None | Some(Value::Object(_))) {
        return Err(SyntaxError::ParamsNotAnObject { place, method });
    }
    Ok(Call { place: Place { subsystem: subsystem.to_owned(), entry, method }, params })
}

fn object(value: Value, place: &str) -> Result<Map<String, Value>, SyntaxError> {
    match value {
        Value::Object(members) => Ok(members),
        _ => Err(SyntaxError::NotAnObject(place.to_owned())),
    }
}

fn expect_no_more(
    members: &Map<String, Value>,
    place: impl FnOnce() -> String,
) -> Result<(), SyntaxError> {
    match members.keys().next() {
        Some(name) => Err(SyntaxError::UnknownMember { place: place(), name: name.clone() }),
        None => Ok(()),
    }
}

/// Replaces C comments by spaces, so that line and column numbers in errors match the file.
fn without_comments(text: &str) -> Result<String, SyntaxError> {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    let mut in_string = false;
    while let Some(c) = chars.next() {
        match (c, chars.peek()) {
            ('\\', Some(_)) if in_string => {
                out.push(c);
                out.extend(chars.next());
            }
            ('"', _) => {
                in_string = !in_string;
                out.push(c);
            }
            ('/', Some('/')) if !in_string => {
                out.push(' ');
                while let Some(c) = chars.next_if(|c| *c != '\n') {
                    out.push(if c == '\r' { c } else { ' ' });
                }
            }
            ('/', Some('*')) if !in_string => {
                chars.next();
                out.push_str("  ");
                skip_block(&mut chars, &mut out)?;
            }
            _ => out.push(c),
        }
    }
    Ok(out)
}

fn skip_block(
    chars: &mut std::iter::Peekable<std::str::Chars<'_>>,
    out: &mut String,
) -> Result<(), SyntaxError> {
    while let Some(c) = chars.next() {
        out.push(if c == '\n' { c } else { ' ' });
        if c == '*' && chars.next_if_eq(&'/').is_some() {
            out.push(' ');
            return Ok(());
        }
    }
    Err(SyntaxError::UnterminatedComment)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn methods(text: &str) -> Vec<String> {
        parse(text).unwrap().into_iter().map(|call| call.place.method).collect()
    }

    #[test]
    fn calls_come_in_the_files_order_and_batches_are_flattened() {
        let text = r#"{"other": 1, "subsystems": [
            {"subsystem": "bdev", "config": [
                {"method": "a", "params": {"x": 1}},
                [{"method": "b"}, {"method": "c", "params": {}}]]},
            {"subsystem": "none", "config": null},
            {"config": [{"method": "d"}], "subsystem": "vhost_blk"}]}"#;
        assert_eq!(methods(text), ["a", "b", "c", "d"]);
        let calls = parse(text).unwrap();
        assert_eq!(calls[0].params, Some(json!({"x": 1})));
        assert_eq!(calls[2].place.to_string(), "c (subsystem bdev, entry 2)");
        assert!(methods("{}").is_empty());
    }

    #[test]
    fn comments_are_allowed_outside_strings() {
        let text = "// one\n{/* two\n * three **/\"subsystems\": [ // four \"\n \
            {\"subsystem\": \"b\", \"config\": [{\"method\": \"a//b /* \\\" */\"}]}]} // end";
        assert_eq!(methods(text), ["a//b /* \" */"]);
        assert!(parse("{} /* no end").unwrap_err().to_string().contains("comment"));
        // Errors name the line of the file.
        let reason = parse("// é\n/* \n */ x").unwrap_err().to_string();
        assert!(reason.contains("line 3 column 5"), "{reason}");
    }

    #[test]
    fn an_invalid_file_is_refused_with_the_reason() {
        let subsystem = |inner: &str| format!(r#"{{"subsystems":[{inner}]}}"#);
        let entry = |inner: &str| subsystem(&format!(r#"{{"subsystem":"b","config":[{inner}]}}"#));
        for (text, part) in [
            (String::new(), "not JSON"),
            ("[]".into(), "expected an object"),
            (r#"{"subsystems":{}}"#.into(), "not a list"),
            (subsystem("1"), "an element of \"subsystems\" is not an object"),
            (subsystem(r#"{"config":[]}"#), "has no name"),
            (subsystem(r#"{"subsystem":"b"}"#), "neither a list nor null"),
            (subsystem(r#"{"subsystem":"b","config":[],"x":1}"#), "unknown member \"x\""),
            (entry("1"), "entry 1 is not an object"),
            (entry(r#"{"method":"a"},{"params":{}}"#), "entry 2: no \"method\""),
            (entry(r#"{"method":"m","params":[]}"#), "entry 1, m: \"params\" is not an object"),
            (entry(r#"{"method":"m","parms":{}}"#), "entry 1, m: unknown member \"parms\""),
        ] {
            let reason = parse(&text).unwrap_err().to_string();
            assert!(reason.contains(part), "{text}: {reason}");
        }
    }
}
