//! Encodes answers: compact JSON in ASCII, keys in SPDK's order.
//!
//! An answer may have tens of megabytes. So it is encoded in time slices, and stored and sent in
//! pieces; no step takes longer than one piece.

use std::collections::VecDeque;
use std::io::{self, Write};

use serde::Serialize;
use serde_json::ser::{CharEscape, CompactFormatter, Formatter, Serializer};
use serde_json::{Value, map};

use crate::client::Client;
use crate::error::RpcError;
use crate::pace::Pace;
use crate::request::Id;

/// Limit on the bytes of one answer, as in SPDK. An error replaces a longer answer.
pub const ANSWER_MAX: usize = 32 * 1024 * 1024;

/// The length at which a piece is full. A piece with a long string may exceed it.
const PIECE: usize = 64 * 1024;

/// The length of a string that takes about as long to write as one value.
const BYTES_PER_VALUE: usize = 64;

/// A text in pieces.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    pieces: VecDeque<Vec<u8>>,
    len: usize,
}

impl Pieces {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The piece to send first.
    pub(crate) fn front(&self) -> Option<&[u8]> {
        self.pieces.front().map(Vec::as_slice)
    }

    /// Removes the first piece.
    pub(crate) fn pop_front(&mut self) {
        self.len -= self.pieces.pop_front().map_or(0, |piece| piece.len());
    }

    /// Appends another text. Long pieces are moved, short ones are copied.
    pub(crate) fn append(&mut self, other: Self) {
        for piece in other.pieces {
            if piece.len() < PIECE / 2 {
                self.write_with(|last| last.extend_from_slice(&piece));
            } else {
                self.len += piece.len();
                self.pieces.push_back(piece);
            }
        }
    }

    /// Appends bytes.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.write_with(|last| last.extend_from_slice(bytes));
    }

    fn write_with(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        if self.pieces.back().is_none_or(|last| last.len() >= PIECE) {
            self.pieces.push_back(Vec::new());
        }
        if let Some(last) = self.pieces.back_mut() {
            let before = last.len();
            write(last);
            self.len += last.len() - before;
        }
    }

    fn json<T: Serialize + ?Sized>(&mut self, value: &T) {
        self.write_with(|last| {
            value
                .serialize(&mut Serializer::with_formatter(last, Ascii))
                .expect("strings, numbers and JSON values can be written to memory");
        });
    }
}

/// Encodes the answer to one request, without a newline. An answer longer than [`ANSWER_MAX`]
/// becomes an error.
pub(crate) async fn encode(
    id: Option<&Id>,
    outcome: Result<Value, RpcError>,
    client: &Client,
) -> Pieces {
    let result = match outcome {
        Ok(result) => result,
        Err(e) => return encode_error(id, &e),
    };
    let mut out = head(id);
    out.push(br#","result":"#);
    write(&mut out, result, &mut Pace::new(client.clone())).await;
    out.push(b"}");
    if out.len() > ANSWER_MAX { encode_error(id, &too_long()) } else { out }
}

/// Encodes the answer to a request that failed.
pub(crate) fn encode_error(id: Option<&Id>, error: &RpcError) -> Pieces {
    let mut out = head(id);
    out.push(br#","error":{"code":"#);
    out.json(&error.code);
    out.push(br#","message":"#);
    out.json(&error.message);
    out.push(b"}}");
    out
}

/// The error that replaces an answer longer than [`ANSWER_MAX`].
pub(crate) fn too_long() -> RpcError {
    RpcError::internal("The answer is too long")
}

fn head(id: Option<&Id>) -> Pieces {
    let mut out = Pieces::default();
    out.push(br#"{"jsonrpc":"2.0","id":"#);
    match id {
        None => out.push(b"null"),
        Some(Id::Number(text)) => out.push(text.as_bytes()),
        Some(Id::Text(text)) => out.json(text),
    }
    out
}

/// A list or an object that is partially written.
enum Open {
    List(std::vec::IntoIter<Value>),
    Object(map::IntoIter),
}

/// Writes a value, and frees each part after writing it. Beyond [`ANSWER_MAX`], only frees.
async fn write(out: &mut Pieces, value: Value, pace: &mut Pace) {
    let mut open: Vec<Open> = Vec::new();
    let mut next = Some(value);
    loop {
        let fits = out.len() <= ANSWER_MAX;
        let is_first = match next.take() {
            Some(Value::Array(list)) => {
                put(out, fits, b"[");
                open.push(Open::List(list.into_iter()));
                true
            }
            Some(Value::Object(object)) => {
                put(out, fits, b"{");
                open.push(Open::Object(object.into_iter()));
                true
            }
            Some(plain) => {
                if fits {
                    out.json(&plain);
                }
                let bytes = plain.as_str().map_or(0, str::len);
                pace.spend(1 + bytes / BYTES_PER_VALUE).await;
                false
            }
            None => false,
        };
        let Some(innermost) = open.last_mut() else { return };
        let comma: &[u8] = if is_first { b"" } else { b"," };
        match innermost {
            Open::List(list) => match list.next() {
                Some(value) => {
                    put(out, fits, comma);
                    next = Some(value);
                    continue;
                }
                None => put(out, fits, b"]"),
            },
            Open::Object(object) => match object.next() {
                Some((name, value)) => {
                    put(out, fits, comma);
                    if fits {
                        out.json(&name);
                    }
                    put(out, fits, b":");
                    next = Some(value);
                    continue;
                }
                None => put(out, fits, b"}"),
            },
        }
        open.pop();
        pace.spend(1).await;
    }
}

fn put(out: &mut Pieces, fits: bool, bytes: &[u8]) {
    if fits {
        out.push(bytes);
    }
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
    use std::future::poll_fn;
    use std::pin::pin;

    fn whole(mut pieces: Pieces) -> String {
        let mut bytes = Vec::new();
        let len = pieces.len();
        while let Some(piece) = pieces.front() {
            bytes.extend_from_slice(piece);
            pieces.pop_front();
        }
        assert_eq!((bytes.len(), pieces.len()), (len, 0));
        String::from_utf8(bytes).unwrap()
    }

    /// The answer's text, and how many times encoding it yielded to other tasks.
    fn text(id: Option<Id>, outcome: Result<Value, RpcError>) -> (String, usize) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut polls = 0;
            let client = Client::local();
            let mut answer = pin!(encode(id.as_ref(), outcome, &client));
            let answer = poll_fn(|context| {
                polls += 1;
                answer.as_mut().poll(context)
            });
            let text = whole(answer.await);
            (text, polls - 1)
        })
    }

    #[test]
    fn keys_are_in_order_and_numbers_keep_their_notation() {
        assert_eq!(
            text(Some(Id::Number("1.50".into())), Ok(json!({"b": 1, "a": [true, null]}))).0,
            r#"{"jsonrpc":"2.0","id":1.50,"result":{"b":1,"a":[true,null]}}"#
        );
        assert_eq!(
            text(None, Err(RpcError::errno(17))).0,
            r#"{"jsonrpc":"2.0","id":null,"error":{"code":-17,"message":"File exists"}}"#
        );
    }

    #[test]
    fn strings_are_ascii_with_upper_case_hex() {
        let value = json!({"é\u{7f}": "\u{1f600}\u{1b}\0\n\t\"\\/ ~\u{ffff}"});
        assert_eq!(
            text(Some(Id::Text("ü".into())), Ok(value.clone())).0,
            concat!(
                r#"{"jsonrpc":"2.0","id":"\u00FC","result":{"\u00E9\u007F":"#,
                r#""\uD83D\uDE00\u001B\u0000\n\t\"\\/ ~\uFFFF"}}"#
            )
        );
        let back: Value = serde_json::from_str(&text(None, Ok(value.clone())).0).unwrap();
        assert_eq!(back["result"], value);
    }

    #[test]
    fn every_shape_is_written_as_serde_writes_it() {
        for value in [
            json!([]),
            json!({}),
            json!([[], {}, [[]], [{}], {"a": {}}, {"a": []}]),
            json!({"a": [1, [2, {"b": [], "c": {"d": null}}], 3], "e": {}, "f": -1.5}),
            json!("text"),
            json!(null),
            json!([1, "two", [3], {"four": 5}, 6]),
        ] {
            let (written, _) = text(None, Ok(value.clone()));
            let expected = format!(r#"{{"jsonrpc":"2.0","id":null,"result":{value}}}"#);
            assert_eq!(written, expected);
        }
    }

    #[test]
    fn encoding_a_long_answer_yields_and_a_short_one_does_not() {
        assert_eq!(text(None, Ok(json!([1, 2, 3]))).1, 0);
        let disks: Vec<Value> = (0..5000).map(|n| json!({"name": n, "more": [n, {}]})).collect();
        let (written, yields) = text(None, Ok(disks.clone().into()));
        let back: Value = serde_json::from_str(&written).unwrap();
        assert_eq!(back["result"], Value::from(disks));
        // Five values each.
        assert_eq!(yields, 5000 * 5 / crate::pace::SLICE_VALUES);
        let strings: Vec<Value> = (0..100).map(|_| "x".repeat(64_000).into()).collect();
        assert_eq!(text(None, Ok(strings.into())).1, 100);
    }

    #[test]
    fn an_answer_that_is_too_long_is_an_error_and_freeing_it_yields() {
        let strings: Vec<Value> = (0..40_000).map(|_| "x".repeat(1000).into()).collect();
        let (written, yields) = text(Some(Id::Number("7".into())), Ok(strings.into()));
        let back: Value = serde_json::from_str(&written).unwrap();
        assert_eq!((&back["id"], &back["error"]["code"]), (&json!(7), &json!(-32603)));
        assert!(yields > 600, "{yields}");
    }
}
