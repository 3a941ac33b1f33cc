//! SPDK's methods and their parameters, for `--check`.

use std::collections::HashMap;
use std::sync::LazyLock;

use serde_json::{Map, Value};

/// All methods of SPDK's vhost application. A test compares this with the methods that exist.
const METHODS: &str = include_str!("methods.tsv");

/// What a method does here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// What it does in SPDK.
    Real,
    /// Keeps options that have no effect.
    Kept,
    /// Does not exist.
    Absent,
}

/// A method of SPDK.
pub(super) struct Method {
    pub(super) kind: Kind,
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
pub(super) fn method(name: &str) -> Option<&'static Method> {
    ALL.get(name)
}

impl Method {
    fn parse(line: &'static str) -> Option<(&'static str, Self)> {
        let mut words = line.split('\t');
        let (name, kind) = (words.next()?, words.next()?);
        let kind = match kind {
            "kept" | "unsaved" => Kind::Kept,
            "absent" => Kind::Absent,
            _ => Kind::Real,
        };
        let parameters = words.filter_map(|word| {
            let (name, of) = word.split_once(':')?;
            let required = of.strip_prefix('*');
            Some(Parameter { name, of: required.unwrap_or(of), required: required.is_some() })
        });
        Some((name, Self { kind, parameters: parameters.collect() }))
    }

    /// What is wrong with these parameters, if anything is. Types are checked, values are not.
    pub(super) fn problem(&self, given: &Map<String, Value>) -> Option<String> {
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
        "array" | "flags" => value.is_array(),
        "object" => value.is_object(),
        _ => match (of.strip_prefix("one("), of.strip_prefix("uint")) {
            (Some(names), _) => {
                let mut names = names.trim_end_matches(')').split('|');
                value.as_str().is_some_and(|text| names.any(|name| name == text))
            }
            (None, Some(bits)) => fits(value, bits.parse().unwrap_or(64)),
            (None, None) => value.as_i64().is_some_and(|number| i32::try_from(number).is_ok()),
        },
    }
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
        let one = json!({"action_on_timeout": "explode"});
        assert!(problem("bdev_nvme_set_options", one).is_some());
        assert_eq!(method("nope").map(|m| m.kind), None);
        assert_eq!(method("bdev_nvme_attach_controller").map(|m| m.kind), Some(Kind::Absent));
        assert_eq!(method("bdev_raid_set_options").map(|m| m.kind), Some(Kind::Kept));
    }
}
