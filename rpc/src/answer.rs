//! The text of an answer: compact JSON in ASCII, keys in SPDK's order.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{CharEscape, CompactFormatter, Formatter, Serializer};

use crate::error::RpcError;
use crate::request::Id;

/// The answer to one request, without a newline. A `result` may be of any size.
pub(crate) fn encode(id: Option<&Id>, outcome: &Result<Value, RpcError>) -> Vec<u8> {
    let mut out = Vec::with_capacity(128);
    out.extend_from_slice(br#"{"jsonrpc":"2.0","id":"#);
    match id {
        None => out.extend_from_slice(b"null"),
        Some(Id::Number(text)) => out.extend_from_slice(text.as_bytes()),
        Some(Id::Text(text)) => write(&mut out, text),
    }
    match outcome {
        Ok(result) => {
            out.extend_from_slice(br#","result":"#);
            write(&mut out, result);
        }
        Err(error) => {
            out.extend_from_slice(br#","error":{"code":"#);
            write(&mut out, &error.code);
            out.extend_from_slice(br#","message":"#);
            write(&mut out, &error.message);
            out.push(b'}');
        }
    }
    out.push(b'}');
    out
}

fn write<T: Serialize + ?Sized>(out: &mut Vec<u8>, value: &T) {
    value
        .serialize(&mut Serializer::with_formatter(out, Ascii))
        .expect("strings, numbers and JSON values can be written to memory");
}

/// Writes everything but printable ASCII as `\uXXXX` with upper-case digits.
struct Ascii;

impl Ascii {
    fn unicode<W: ?Sized + Write>(writer: &mut W, character: char) -> io::Result<()> {
        for unit in character.encode_utf16(&mut [0; 2]) {
            write!(writer, "\\u{unit:04X}")?;
        }
        Ok(())
    }
}

impl Formatter for Ascii {
    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let plain = |c: char| (' '..'\x7f').contains(&c);
        let mut rest = fragment;
        while let Some((index, character)) = rest.char_indices().find(|&(_, c)| !plain(c)) {
            writer.write_all(&rest.as_bytes()[..index])?;
            Self::unicode(writer, character)?;
            rest = &rest[index + character.len_utf8()..];
        }
        writer.write_all(rest.as_bytes())
    }

    fn write_char_escape<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        match escape {
            CharEscape::AsciiControl(byte) => Self::unicode(writer, char::from(byte)),
            other => CompactFormatter.write_char_escape(writer, other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn text(id: Option<Id>, outcome: Result<Value, RpcError>) -> String {
        String::from_utf8(encode(id.as_ref(), &outcome)).unwrap()
    }

    #[test]
    fn keys_come_in_order_and_numbers_stay() {
        assert_eq!(
            text(Some(Id::Number("1.50".into())), Ok(json!({"b": 1, "a": [true, null]}))),
            r#"{"jsonrpc":"2.0","id":1.50,"result":{"b":1,"a":[true,null]}}"#
        );
        assert_eq!(
            text(None, Err(RpcError::errno(17))),
            r#"{"jsonrpc":"2.0","id":null,"error":{"code":-17,"message":"File exists"}}"#
        );
    }

    #[test]
    fn strings_are_ascii_with_upper_case_hex() {
        let value = json!({"é\u{7f}": "\u{1f600}\u{1b}\0\n\t\"\\/ ~\u{ffff}"});
        assert_eq!(
            text(Some(Id::Text("ü".into())), Ok(value.clone())),
            concat!(
                r#"{"jsonrpc":"2.0","id":"\u00FC","result":{"\u00E9\u007F":"#,
                r#""\uD83D\uDE00\u001B\u0000\n\t\"\\/ ~\uFFFF"}}"#
            )
        );
        let back: Value = serde_json::from_str(&text(None, Ok(value.clone()))).unwrap();
        assert_eq!(back["result"], value);
    }
}
