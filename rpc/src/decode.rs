//! Decodes parameters into Rust values, as strictly as SPDK does.
//!
//! This is a serde deserializer over JSON text that differs from serde_json's: an object that
//! becomes a struct may have neither unknown nor repeated names, `1e2` and `512.0` are integers, a
//! string may not contain a NUL, and `null` is not a value of an optional field (which must be left
//! out instead). The caller chooses the strictness, so types need no serde attributes for it.

use std::collections::HashSet;
use std::fmt;
use std::marker::PhantomData;

use serde::de::value::StringDeserializer;
use serde::de::{
    self, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor,
};
use serde::{Deserialize, forward_to_deserialize_any};
use serde_json::value::RawValue;

use crate::request::members;

/// Whether the outermost object may have unknown names. Inner objects may not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UnknownNames {
    Refused,
    Ignored,
}

/// Decodes one JSON value.
pub(crate) fn decode<'de, T: Deserialize<'de>>(
    text: &'de str,
    unknown_names: UnknownNames,
) -> Result<T, Error> {
    decode_seed(PhantomData, text, unknown_names)
}

/// As [`decode`], with a seed in place of a type.
pub(crate) fn decode_seed<'de, S: DeserializeSeed<'de>>(
    seed: S,
    text: &'de str,
    unknown_names: UnknownNames,
) -> Result<S::Value, Error> {
    seed.deserialize(Text { text: text.trim_ascii(), unknown_names })
}

/// Why a value cannot be decoded. It goes to the log; SPDK's answers have no details.
#[derive(Debug)]
pub(crate) struct Error(String);

impl Error {
    /// Truncates the reason to 200 printable characters, because clients choose parts of it.
    fn new(text: impl fmt::Display) -> Self {
        let text: String = text.to_string();
        let printable = |c: char| if c.is_control() { '?' } else { c };
        let text = text.chars().map(printable).take(200).collect();
        Self(text)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

impl de::Error for Error {
    fn custom<T: fmt::Display>(text: T) -> Self {
        Self::new(text)
    }
}

impl From<serde_json::Error> for Error {
    fn from(error: serde_json::Error) -> Self {
        Self::new(error)
    }
}

/// The text of one JSON value, without surrounding white space.
#[derive(Clone, Copy)]
struct Text<'de> {
    text: &'de str,
    unknown_names: UnknownNames,
}

impl<'de> Text<'de> {
    fn inner(raw: &'de RawValue) -> Self {
        Self { text: raw.get(), unknown_names: UnknownNames::Refused }
    }

    fn first(&self) -> u8 {
        self.text.as_bytes().first().copied().unwrap_or_default()
    }

    fn string(&self) -> Result<String, Error> {
        if self.first() != b'"' {
            return Err(self.unexpected("a string"));
        }
        let string: String = serde_json::from_str(self.text)?;
        if string.contains('\0') {
            return Err(Error::new("a string contains a NUL character"));
        }
        Ok(string)
    }

    fn is_number(&self) -> bool {
        matches!(self.first(), b'-' | b'0'..=b'9')
    }

    /// Whether the number is an integer that fits into `u64` or `i64`, such as `5`, `5.0` and
    /// `5e0`. A plain integer that does not fit counts as an integer, too, and not as a
    /// floating-point number.
    fn is_whole(&self) -> bool {
        let limit = |negative| if negative { i64::MIN.unsigned_abs() } else { u64::MAX };
        let fits = |(negative, size)| size <= u128::from(limit(negative));
        !self.text.contains(['.', 'e', 'E']) || integer(self.text).is_ok_and(fits)
    }

    fn unexpected(&self, expected: &str) -> Error {
        let found = match self.first() {
            b'{' => "an object",
            b'[' => "an array",
            b'"' => "a string",
            b't' | b'f' => "a boolean",
            b'n' => "null",
            _ => "a number",
        };
        Error::new(format_args!("expected {expected}, found {found}"))
    }

    fn integer<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if !self.is_number() {
            return Err(self.unexpected("an integer"));
        }
        let range = || Error::new("an integer is out of range");
        let (negative, size) = integer(self.text)?;
        let size = u64::try_from(size).map_err(|_| range())?;
        if !negative {
            return visitor.visit_u64(size);
        }
        visitor.visit_i64(0i64.checked_sub_unsigned(size).ok_or_else(range)?)
    }

    fn float<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if !self.is_number() {
            return Err(self.unexpected("a number"));
        }
        match self.text.parse::<f64>() {
            Ok(number) if number.is_finite() => visitor.visit_f64(number),
            _ => Err(Error::new("a number is out of range")),
        }
    }

    fn object<V: Visitor<'de>>(
        self,
        known: Option<&'static [&'static str]>,
        visitor: V,
    ) -> Result<V::Value, Error> {
        if self.first() != b'{' {
            return Err(self.unexpected("an object"));
        }
        let mut members = members(self.text)?;
        if let Some(known) = known {
            let is_known = |name: &str| known.contains(&name);
            if self.unknown_names == UnknownNames::Ignored {
                members.retain(|(name, _)| is_known(name));
            } else if let Some((name, _)) = members.iter().find(|(name, _)| !is_known(name)) {
                return Err(Error::new(format_args!("unknown name '{name}'")));
            }
        }
        let mut seen = HashSet::new();
        if let Some((name, _)) = members.iter().find(|(name, _)| !seen.insert(name.as_str())) {
            return Err(Error::new(format_args!("duplicate name '{name}'")));
        }
        visitor.visit_map(Members { rest: members.into_iter(), current: None })
    }

    fn array<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.first() != b'[' {
            return Err(self.unexpected("an array"));
        }
        let elements: Vec<&'de RawValue> = serde_json::from_str(self.text)?;
        visitor.visit_seq(Elements(elements.into_iter()))
    }
}

/// Parses an integer in any notation of JSON: whether it is negative, and its absolute value. Its
/// fraction must be zero.
fn integer(text: &str) -> Result<(bool, u128), Error> {
    let range = || Error::new("an integer is out of range");
    let (negative, text) = text.strip_prefix('-').map_or((false, text), |text| (true, text));
    let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{whole}{fraction}");
    let significant = digits.trim_end_matches('0');
    let dropped = digits.len() - significant.len();
    let significant = significant.trim_start_matches('0');
    if significant.is_empty() {
        return Ok((negative, 0));
    }
    let exponent: i64 = exponent.parse().map_err(|_| range())?;
    // Both lengths are far below `i64::MAX`: a request has at most 256 KiB.
    let exponent = exponent.checked_add(dropped as i64).ok_or_else(range)? - fraction.len() as i64;
    if exponent < 0 {
        return Err(Error::new("expected an integer, found a fraction"));
    }
    let power = u32::try_from(exponent).ok().and_then(|power| 10u128.checked_pow(power));
    let size: u128 = significant.parse().map_err(|_| range())?;
    Ok((negative, power.and_then(|power| size.checked_mul(power)).ok_or_else(range)?))
}

impl<'de> Deserializer<'de> for Text<'de> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.first() {
            b'{' => self.object(None, visitor),
            b'[' => self.array(visitor),
            b'"' => visitor.visit_string(self.string()?),
            b't' | b'f' => self.deserialize_bool(visitor),
            b'n' => visitor.visit_unit(),
            _ if self.is_whole() => self.integer(visitor),
            _ => self.float(visitor),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.text {
            "true" => visitor.visit_bool(true),
            "false" => visitor.visit_bool(false),
            _ => Err(self.unexpected("a boolean")),
        }
    }

    fn deserialize_u8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.integer(visitor)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.integer(visitor)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.integer(visitor)
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.integer(visitor)
    }

    fn deserialize_i8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.integer(visitor)
    }

    fn deserialize_i16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.integer(visitor)
    }

    fn deserialize_i32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.integer(visitor)
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.integer(visitor)
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.float(visitor)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.float(visitor)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_string(self.string()?)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_string(self.string()?)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.first() == b'n' {
            return Err(Error::new("expected a value, found null"));
        }
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.object(None, visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.object(Some(fields), visitor)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.array(visitor)
    }

    fn deserialize_tuple<V: Visitor<'de>>(
        self,
        _len: usize,
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.array(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let name: StringDeserializer<Error> = self.string()?.into_deserializer();
        visitor.visit_enum(name)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    forward_to_deserialize_any! {
        char bytes byte_buf unit unit_struct tuple_struct identifier
    }
}

struct Members<'de> {
    rest: std::vec::IntoIter<(String, &'de RawValue)>,
    current: Option<(String, &'de RawValue)>,
}

impl<'de> MapAccess<'de> for Members<'de> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let Some((name, value)) = self.rest.next() else { return Ok(None) };
        let key: StringDeserializer<Error> = name.clone().into_deserializer();
        self.current = Some((name, value));
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let (name, value) = self.current.take().ok_or_else(|| Error::new("no member"))?;
        seed.deserialize(Text::inner(value))
            .map_err(|error| Error::new(format_args!("'{name}': {error}")))
    }
}

struct Elements<'de>(std::vec::IntoIter<&'de RawValue>);

impl<'de> SeqAccess<'de> for Elements<'de> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Error> {
        self.0.next().map(|raw| seed.deserialize(Text::inner(raw))).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[derive(Debug, Deserialize, PartialEq)]
    struct Sample {
        name: String,
        #[serde(default)]
        count: u32,
        signed: Option<i32>,
        ratio: Option<f64>,
        level: Option<Level>,
        list: Option<Vec<u8>>,
        nested: Option<Nested>,
        #[serde(rename = "renamed", alias = "also")]
        other: Option<bool>,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    struct Nested {
        a: u64,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    enum Level {
        Error,
        #[serde(rename = "r/w")]
        ReadWrite,
    }

    fn strict(text: &str) -> Result<Sample, Error> {
        decode(text, UnknownNames::Refused)
    }

    #[test]
    fn every_kind_of_field() {
        let sample = strict(
            r#" {"name":"a\u00e9","count":1e2,"signed":-5.0,"ratio":0.25,"level":"r/w",
                "list":[1,2.0],"nested":{"a":18446744073709551615},"also":true} "#,
        )
        .unwrap();
        assert_eq!(
            sample,
            Sample {
                name: "aé".into(),
                count: 100,
                signed: Some(-5),
                ratio: Some(0.25),
                level: Some(Level::ReadWrite),
                list: Some(vec![1, 2]),
                nested: Some(Nested { a: u64::MAX }),
                other: Some(true),
            }
        );
        assert_eq!(strict(r#"{"name":"x"}"#).unwrap().count, 0);
    }

    #[test]
    fn integers_in_every_notation() {
        for (text, value) in [
            ("0", Some(0)),
            ("-0", Some(0)),
            ("1e2", Some(100)),
            ("512.0", Some(512)),
            ("0e999999", Some(0)),
            ("1.5e1", Some(15)),
            ("1200e-2", Some(12)),
            ("4294967295", Some(4294967295u32)),
            ("0.0004294967295e13", Some(4294967295)),
            ("4294967296", None),
            ("-1", None),
            ("0.5", None),
            ("1e-1", None),
            ("1e30", None),
            ("1e99999999999999999999", None),
            ("1e-99999999999999999999", None),
            ("1e9223372036854775807", None),
            ("10e9223372036854775807", None),
            ("340282366920938463463374607431768211456", None),
            ("1e38", None),
            ("true", None),
            ("\"1\"", None),
        ] {
            assert_eq!(decode::<u32>(text, UnknownNames::Refused).ok(), value, "{text}");
        }
        fn number<T: for<'de> Deserialize<'de>>(text: &str) -> Option<T> {
            decode(text, UnknownNames::Refused).ok()
        }
        assert_eq!(number("-9223372036854775808"), Some(i64::MIN));
        assert_eq!(number::<i64>("-9223372036854775809"), None);
        assert_eq!(number::<u64>("18446744073709551616"), None);
        assert_eq!(number::<f64>("1e999"), None);
    }

    #[test]
    fn refuses_what_spdk_refuses() {
        for text in [
            r#"{}"#,
            r#"[]"#,
            r#"["a"]"#,
            r#"{"name":"a","name":"a"}"#,
            r#"{"name":"a","unknown":1}"#,
            r#"{"name":"a","nested":{"a":1,"b":2}}"#,
            r#"{"name":"a","nested":{"a":1,"a":1}}"#,
            r#"{"name":"a","nested":[1]}"#,
            r#"{"name":"a\u0000b"}"#,
            r#"{"name":5}"#,
            r#"{"name":null}"#,
            r#"{"name":"a","signed":null}"#,
            r#"{"name":"a","count":-1}"#,
            r#"{"name":"a","count":"1"}"#,
            r#"{"name":"a","level":"error"}"#,
            r#"{"name":"a","level":0}"#,
            r#"{"name":"a","list":[256]}"#,
            r#"{"name":"a","renamed":1}"#,
            r#"{"name":"a","renamed":true,"also":true}"#,
        ] {
            assert!(strict(text).is_err(), "{text}");
        }
    }

    #[test]
    fn unknown_names_are_ignored_in_the_outermost_object_only() {
        let relaxed = |text| decode::<Sample>(text, UnknownNames::Ignored);
        assert!(relaxed(r#"{"name":"a","x":1,"x":2,"y":{"z":null}}"#).is_ok());
        assert!(relaxed(r#"{"name":"a","name":"b"}"#).is_err());
        assert!(relaxed(r#"{"name":"a","nested":{"a":1,"b":2}}"#).is_err());
    }

    #[test]
    fn any_value_decodes_as_a_json_value() {
        let value = |text| decode::<Value>(text, UnknownNames::Refused);
        let text = r#"{"a":[1,-2,1.5,"x",null,true,{"b":{}}]}"#;
        assert_eq!(value(text).unwrap(), json!({"a":[1,-2,1.5,"x",null,true,{"b":{}}]}));
        let numbers = value("[2.0,1e3,-5.0e0,18446744073709551615.0,1e20,0.5]");
        assert_eq!(numbers.unwrap(), json!([2, 1000, -5, u64::MAX, 1e20, 0.5]));
        assert!(value("18446744073709551616").is_err());
        assert!(value(r#"{"a":1,"a":1}"#).is_err());
    }

    #[test]
    fn the_reason_names_the_member_and_is_short_and_printable() {
        let reason = strict(r#"{"name":"a","nested":{"a":"x"}}"#).unwrap_err().to_string();
        assert_eq!(reason, "'nested': 'a': expected an integer, found a string");
        let long = format!(r#"{{"{}\n\u001b":1}}"#, "é".repeat(5000));
        let reason = strict(&long).unwrap_err().to_string();
        assert!(reason.chars().count() <= 200 && !reason.contains(char::is_control));
    }
}
