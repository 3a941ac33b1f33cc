//! Finds the end of a JSON value in a stream, byte by byte, without recursion.
//!
//! The scanner accepts exactly the grammar of RFC 8259, except that the caller checks UTF-8 on the
//! whole value. So it reports an invalid byte at once, and not only when the brackets balance. It
//! keeps its state between reads, so a request that arrives one byte at a time costs no more than
//! one that arrives whole.

/// Limit on the nesting depth, as in SPDK. A deeper request is a parse error. The scanner's stack
/// has one bit for each level.
pub(crate) const DEPTH_MAX: u32 = 64;

/// Limit on the tokens of one request (names, values, and both brackets of each container), as in
/// SPDK.
pub(crate) const TOKENS_MAX: u32 = 8192;

/// The result of [`Scanner::feed`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Scan {
    /// The value continues after these bytes.
    Incomplete,
    /// The value ends after this number of these bytes. 0: it ended before them.
    Complete(usize),
    /// The bytes are not the start of a JSON value.
    Invalid,
}

/// The state between two bytes of one value.
#[derive(Debug)]
pub(crate) struct Scanner {
    state: State,
    /// The open containers, the innermost in bit 0: 1 for an object, 0 for an array.
    stack: u64,
    depth: u32,
    tokens: u32,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// Only white space so far.
    Idle,
    Value,
    FirstElement,
    FirstName,
    Name,
    Colon,
    AfterValue,
    Text(Text),
    Literal(&'static [u8]),
    Number(Number),
}

#[derive(Clone, Copy, Debug)]
struct Text {
    is_name: bool,
    /// A high surrogate was read, so a low one must follow.
    needs_low: bool,
    at: TextAt,
}

#[derive(Clone, Copy, Debug)]
enum TextAt {
    Plain,
    Escape,
    Hex { left: u8, code: u16 },
}

#[derive(Clone, Copy, Debug)]
enum Number {
    Minus,
    Zero,
    Integer,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
}

enum Step {
    Next(State),
    /// The value ended before this byte.
    EndedBefore,
    Invalid,
}

impl Scanner {
    pub(crate) fn new() -> Self {
        Self { state: State::Idle, stack: 0, depth: 0, tokens: 0 }
    }

    /// Whether no byte of a value has been read.
    pub(crate) fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle)
    }

    /// Scans the bytes that follow those of the last call. After a result other than
    /// [`Scan::Incomplete`], the scanner must not be used again.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Scan {
        for (index, &byte) in bytes.iter().enumerate() {
            match self.step(byte) {
                Step::Next(state) => self.state = state,
                Step::EndedBefore => return Scan::Complete(index),
                Step::Invalid => return Scan::Invalid,
            }
            if self.tokens > TOKENS_MAX {
                return Scan::Invalid;
            }
            if self.depth == 0 && matches!(self.state, State::AfterValue) {
                return Scan::Complete(index + 1);
            }
        }
        Scan::Incomplete
    }

    fn step(&mut self, byte: u8) -> Step {
        match self.state {
            State::Text(text) => text_step(text, byte),
            State::Literal(rest) => match rest.split_first() {
                Some((&next, [])) if next == byte => Step::Next(State::AfterValue),
                Some((&next, rest)) if next == byte => Step::Next(State::Literal(rest)),
                _ => Step::Invalid,
            },
            State::Number(number) => match number_step(number, byte) {
                Some(number) => Step::Next(State::Number(number)),
                None if !number_may_end(number) => Step::Invalid,
                None if self.depth == 0 => Step::EndedBefore,
                None => {
                    self.state = State::AfterValue;
                    self.step(byte)
                }
            },
            state if is_space(byte) => Step::Next(state),
            State::FirstElement if byte == b']' => self.close(),
            State::Idle | State::Value | State::FirstElement => self.value(byte),
            State::FirstName if byte == b'}' => self.close(),
            State::FirstName | State::Name if byte == b'"' => self.text(true),
            State::FirstName | State::Name => Step::Invalid,
            State::Colon if byte == b':' => Step::Next(State::Value),
            State::Colon => Step::Invalid,
            State::AfterValue => match (byte, self.in_object()) {
                (b',', true) => Step::Next(State::Name),
                (b',', false) => Step::Next(State::Value),
                (b'}', true) | (b']', false) => self.close(),
                _ => Step::Invalid,
            },
        }
    }

    fn in_object(&self) -> bool {
        self.stack & 1 == 1
    }

    fn value(&mut self, byte: u8) -> Step {
        match byte {
            b'{' => return self.open(true),
            b'[' => return self.open(false),
            b'"' => return self.text(false),
            _ => self.tokens += 1,
        }
        Step::Next(match byte {
            b't' => State::Literal(b"rue"),
            b'f' => State::Literal(b"alse"),
            b'n' => State::Literal(b"ull"),
            b'-' => State::Number(Number::Minus),
            b'0' => State::Number(Number::Zero),
            b'1'..=b'9' => State::Number(Number::Integer),
            _ => return Step::Invalid,
        })
    }

    fn text(&mut self, is_name: bool) -> Step {
        self.tokens += 1;
        Step::Next(State::Text(Text { is_name, needs_low: false, at: TextAt::Plain }))
    }

    fn open(&mut self, object: bool) -> Step {
        if self.depth == DEPTH_MAX {
            return Step::Invalid;
        }
        self.tokens += 1;
        self.depth += 1;
        self.stack = (self.stack << 1) | u64::from(object);
        Step::Next(if object { State::FirstName } else { State::FirstElement })
    }

    fn close(&mut self) -> Step {
        self.tokens += 1;
        self.depth -= 1;
        self.stack >>= 1;
        Step::Next(State::AfterValue)
    }
}

/// JSON's white space.
pub(crate) fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r')
}

fn text_step(text: Text, byte: u8) -> Step {
    let Text { is_name, needs_low, at } = text;
    let next = |needs_low, at| Step::Next(State::Text(Text { is_name, needs_low, at }));
    match at {
        TextAt::Plain => match byte {
            b'\\' => next(needs_low, TextAt::Escape),
            _ if needs_low => Step::Invalid,
            b'"' if is_name => Step::Next(State::Colon),
            b'"' => Step::Next(State::AfterValue),
            0..0x20 => Step::Invalid,
            _ => next(false, TextAt::Plain),
        },
        TextAt::Escape => match byte {
            b'u' => next(needs_low, TextAt::Hex { left: 4, code: 0 }),
            _ if needs_low => Step::Invalid,
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => next(false, TextAt::Plain),
            _ => Step::Invalid,
        },
        TextAt::Hex { left, code } => {
            let digit = char::from(byte).to_digit(16).and_then(|digit| u16::try_from(digit).ok());
            let Some(digit) = digit else { return Step::Invalid };
            let code = (code << 4) | digit;
            if left > 1 {
                return next(needs_low, TextAt::Hex { left: left - 1, code });
            }
            match (needs_low, code) {
                (true, 0xDC00..=0xDFFF) => next(false, TextAt::Plain),
                (true, _) | (false, 0xDC00..=0xDFFF) => Step::Invalid,
                (false, 0xD800..=0xDBFF) => next(true, TextAt::Plain),
                (false, _) => next(false, TextAt::Plain),
            }
        }
    }
}

fn number_step(number: Number, byte: u8) -> Option<Number> {
    use Number::*;
    Some(match (number, byte) {
        (Minus, b'0') => Zero,
        (Minus, b'1'..=b'9') | (Integer, b'0'..=b'9') => Integer,
        (Zero | Integer, b'.') => Point,
        (Point | Fraction, b'0'..=b'9') => Fraction,
        (Zero | Integer | Fraction, b'e' | b'E') => Exponent,
        (Exponent, b'+' | b'-') => ExponentSign,
        (Exponent | ExponentSign | ExponentDigits, b'0'..=b'9') => ExponentDigits,
        _ => return None,
    })
}

fn number_may_end(number: Number) -> bool {
    use Number::*;
    matches!(number, Zero | Integer | Fraction | ExponentDigits)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scans `text` as a whole, then byte by byte. Both results must be equal.
    fn scan(text: impl AsRef<[u8]>) -> Scan {
        let text = text.as_ref();
        let whole = Scanner::new().feed(text);
        let mut scanner = Scanner::new();
        for index in 0..text.len() {
            let step = match scanner.feed(&text[index..=index]) {
                Scan::Incomplete => continue,
                Scan::Complete(used) => Scan::Complete(index + used),
                Scan::Invalid => Scan::Invalid,
            };
            assert_eq!(step, whole, "{:?}", String::from_utf8_lossy(text));
            return whole;
        }
        assert_eq!(whole, Scan::Incomplete);
        whole
    }

    #[test]
    fn agrees_with_serde_json_on_what_is_json() {
        let good = [
            r#"{}"#,
            r#"[]"#,
            r#" {"a":[1,2,{"b":null}],"c":true} "#,
            r#""x\u00e9\n""#,
            r#"{"a":-0.5e+10}"#,
            r#"[0,-0,1.0,1e2,1E-2]"#,
            r#""\ud83d\ude00""#,
            "[\t\r\n1 ,2 ]",
            r#"{"":{"":[[],[]]}}"#,
            "true ",
            "null\n",
            "12 ",
        ];
        for text in good {
            assert!(serde_json::from_str::<serde_json::Value>(text).is_ok(), "{text}");
            assert!(matches!(scan(text), Scan::Complete(_)), "{text}");
        }
        let bad = [
            "}",
            "]",
            "{]",
            "[}",
            "[1,]",
            r#"{"a":1,}"#,
            r#"{"a" 1}"#,
            r#"{a:1}"#,
            "[01]",
            "[1.]",
            "[.5]",
            "[+1]",
            "[1e]",
            "[1e+]",
            "[-]",
            "tru ",
            "[nul]",
            "// x",
            "[1 2]",
            r#"{"a":}"#,
            "\"a\nb\"",
            r#""\x""#,
            r#""\u12g4""#,
            r#""\ud83d""#,
            r#""\ude00""#,
            r#""\ud83dA""#,
            r#""\ud83d\n""#,
            r#""\ud83d\u0041""#,
            "\u{feff}{}",
            "'a'",
            "NaN",
            "\0",
            "{\"a\":1\0}",
        ];
        for text in bad {
            assert!(serde_json::from_str::<serde_json::Value>(text).is_err(), "{text}");
            assert_eq!(scan(text), Scan::Invalid, "{text}");
        }
    }

    #[test]
    fn ends_where_the_value_ends() {
        assert_eq!(scan("  {} {}"), Scan::Complete(4));
        assert_eq!(scan("12{}"), Scan::Complete(2));
        assert_eq!(scan("12"), Scan::Incomplete);
        assert_eq!(scan(" \n"), Scan::Incomplete);
        assert_eq!(scan(r#"{"a":"}"}x"#), Scan::Complete(9));
        assert_eq!(scan(r#"{"a":"\"}"#), Scan::Incomplete);
    }

    #[test]
    fn bounds_depth_and_tokens() {
        let depth = DEPTH_MAX as usize;
        let nested = |n: usize| "[".repeat(n) + &"]".repeat(n);
        assert_eq!(scan(nested(depth)), Scan::Complete(2 * depth));
        assert_eq!(scan(nested(depth + 1)), Scan::Invalid);
        assert_eq!(scan("{\"a\":".repeat(depth + 1)), Scan::Invalid);
        // Two brackets and 8190 numbers are 8192 tokens.
        let list = |n: usize| format!("[{}]", vec!["1"; n].join(","));
        assert!(matches!(scan(list(8190)), Scan::Complete(_)));
        assert_eq!(scan(list(8191)), Scan::Invalid);
    }
}
