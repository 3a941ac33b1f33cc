//! SPDK's methods and their parameters, as data: for `--check`, and for the methods that only keep
//! options or have no objects to show ([`super::absent`]).

use std::collections::HashMap;
use std::sync::LazyLock;

use serde_json::{Map, Value};

/// All methods of SPDK's vhost application. A test compares this with the methods that exist.
const METHODS: &str = include_str!("schema.tsv");

/// What a method does here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// What it does in SPDK.
    Real,
    /// Keeps options that have no effect.
    Kept,
    /// Does not exist.
    Absent,
}

/// A method of SPDK.
pub(crate) struct Method {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    parameters: Vec<Parameter>,
}

struct Parameter {
    name: &'static str,
    of: &'static str,
    required: bool,
}

static ALL: LazyLock<HashMap<&'static str, Method>> = LazyLock::new(|| {
    let lines = METHODS.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(Method::parse).collect()
});

/// The method of this name.
pub(crate) fn method(name: &str) -> Option<&'static Method> {
    ALL.get(name)
}

impl Method {
    fn parse(line: &'static str) -> Option<(&'static str, Self)> {
        let mut words = line.split('\t');
        let (name, kind) = (words.next()?, words.next()?);
        let kind = match kind {
            "kept" | "unsaved" | "optional" => Kind::Kept,
            "absent" => Kind::Absent,
            _ => Kind::Real,
        };
        let parameters = words.filter_map(|word| {
            let (name, of) = word.split_once(':')?;
            let required = of.strip_prefix('*');
            Some(Parameter { name, of: required.unwrap_or(of), required: required.is_some() })
        });
        Some((name, Self { name, kind, parameters: parameters.collect() }))
    }

    /// What is wrong with these parameters, if anything is. Types are checked, values are not.
    pub(crate) fn problem(&self, given: &Map<String, Value>) -> Option<String> {
        let missing = self.parameters.iter().find(|p| p.required && !given.contains_key(p.name));
        if let Some(missing) = missing {
            return Some(format!("the parameter {:?} is missing", missing.name));
        }
        given.iter().find_map(|(name, value)| {
            let Some(parameter) = self.parameters.iter().find(|p| p.name == name) else {
                return Some(format!("there is no parameter {name:?}"));
            };
            (!is_of(parameter.of, value))
                .then(|| format!("the parameter {name:?} is {value}, but must be {}", parameter.of))
        })
    }
}

fn is_of(of: &str, value: &Value) -> bool {
    match of {
        "boolean" => value.is_boolean(),
        "string" | "uuid" => value.is_string(),
        "array" => value.is_array(),
        "strings" => value.as_array().is_some_and(|all| all.iter().all(Value::is_string)),
        "texts" => value.as_object().is_some_and(|all| all.values().all(Value::is_string)),
        "int32" => value.as_i64().is_some_and(|number| i32::try_from(number).is_ok()),
        _ => {
            let inside = |kind| of.strip_prefix(kind)?.strip_prefix('(')?.strip_suffix(')');
            if let Some(names) = inside("one") {
                let mut names = names.split('|');
                return value.as_str().is_some_and(|text| names.any(|name| name == text));
            }
            if let Some(members) = inside("object") {
                return value.as_object().is_some_and(|object| has_only(members, object));
            }
            of.strip_prefix("uint")
                .and_then(|bits| bits.parse().ok())
                .is_some_and(|bits| fits(value, bits))
        }
    }
}

/// Whether an object has only these members, each of its type.
fn has_only(members: &str, object: &Map<String, Value>) -> bool {
    let members = members.split(',').filter_map(|member| member.split_once('='));
    object
        .iter()
        .all(|(name, value)| members.clone().any(|(known, of)| known == name && is_of(of, value)))
}

/// Whether a value is an integer of so many bits, in any notation: `4096`, `4096.0`, `4e3`.
fn fits(value: &Value, bits: u32) -> bool {
    let max = u64::MAX >> (64 - bits.clamp(1, 64));
    match (value.as_u64(), value.as_f64()) {
        (Some(number), _) => number <= max,
        #[expect(
            clippy::cast_precision_loss,
            reason = "a bound of a number that is a float itself"
        )]
        (None, Some(number)) => number >= 0.0 && number.fract() == 0.0 && number <= max as f64,
        (None, None) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn types_are_checked_to_their_limits() {
        let object = "object(a=boolean,b=one(x|y))";
        let cases = [
            ("boolean", json!(true), json!(1)),
            ("uint8", json!(255), json!(256)),
            ("uint16", json!(65535), json!(-1)),
            ("uint32", json!(u32::MAX), json!(1_u64 << 32)),
            ("uint64", json!(u64::MAX), json!("1")),
            ("uint64", json!(4e3), json!(1.5)),
            ("int32", json!(i32::MIN), json!(i64::from(i32::MIN) - 1)),
            ("string", json!(""), json!(["a"])),
            ("one(a|b)", json!("b"), json!("B")),
            ("array", json!([1, "a"]), json!("a")),
            ("strings", json!(["a", "b"]), json!(["a", 1])),
            ("texts", json!({"a": "b"}), json!({"a": 1})),
            (object, json!({}), json!([])),
            (object, json!({"b": "y", "a": false}), json!({"b": "z"})),
            (object, json!({"a": true}), json!({"c": true})),
        ];
        for (of, good, bad) in cases {
            assert!(is_of(of, &good), "{of} {good}");
            assert!(!is_of(of, &bad), "{of} {bad}");
            assert!(!is_of(of, &Value::Null), "{of}");
        }
    }

    #[test]
    fn every_type_of_the_table_is_known() {
        for parameter in ALL.values().flat_map(|method| &method.parameters) {
            let of = parameter.of;
            let samples = [json!(true), json!("x"), json!(1), json!([]), json!({})];
            let named = of.strip_prefix("one(").and_then(|names| names.split(['|', ')']).next());
            let named = named.map(Value::from);
            assert!(samples.iter().chain(&named).any(|value| is_of(of, value)), "{of}");
        }
    }

    #[test]
    fn parameters_are_checked_by_name_and_type() {
        let problem =
            |name: &str, params: Value| method(name).unwrap().problem(params.as_object().unwrap());
        assert_eq!(
            problem("bdev_malloc_create", json!({"num_blocks": 8e3, "block_size": 512})),
            None
        );
        let missing = problem("bdev_malloc_create", json!({"num_blocks": 8}));
        assert_eq!(missing.unwrap(), "the parameter \"block_size\" is missing");
        let unknown = json!({"num_blocks": 8, "block_size": 512, "size": 1});
        let unknown = problem("bdev_malloc_create", unknown);
        assert_eq!(unknown.unwrap(), "there is no parameter \"size\"");
        let of = json!({"num_blocks": -1, "block_size": 512});
        assert!(problem("bdev_malloc_create", of).unwrap().ends_with("-1, but must be uint64"));
        assert!(problem("vmd_enable", json!({})).is_none());
        assert_eq!(method("nope").map(|m| m.kind), None);
        assert_eq!(method("bdev_nvme_cuse_register").map(|m| m.kind), Some(Kind::Absent));
        assert_eq!(method("fsdev_set_opts").map(|m| m.kind), Some(Kind::Kept));
    }
}
