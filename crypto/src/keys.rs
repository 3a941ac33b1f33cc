//! Named keys.

use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;

use zeroize::Zeroizing;

use crate::xts::Xts;

/// A key. Its bytes are zeroed when it is dropped, and appear in no log.
pub struct Key {
    name: String,
    /// The key of the data, and that of the tweaks, as the operator gave them: hexadecimal.
    text: [Zeroizing<String>; 2],
    xts: Xts,
}

/// The reason for which a key is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyError {
    /// The name is in use.
    Exists,
    /// The keys are equal, missing, of different or wrong length, or not hexadecimal.
    Invalid,
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Key {
    /// Makes a key of two hexadecimal keys of 16 or 32 bytes each: for the data and for the tweaks.
    ///
    /// # Errors
    /// [`KeyError::Invalid`].
    pub fn new(
        name: String,
        data: Zeroizing<String>,
        tweak: Zeroizing<String>,
    ) -> Result<Arc<Self>, KeyError> {
        let [one, two] = [&data, &tweak].map(|text| bytes(text));
        let (one, two) = (one.ok_or(KeyError::Invalid)?, two.ok_or(KeyError::Invalid)?);
        if one == two {
            return Err(KeyError::Invalid);
        }
        let xts = Xts::new(&one, &two).ok_or(KeyError::Invalid)?;
        Ok(Arc::new(Self { name, text: [data, tweak], xts }))
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The keys in clear, hexadecimal: of the data, and of the tweaks.
    pub(crate) fn text(&self) -> [&str; 2] {
        self.text.each_ref().map(|text| text.as_str())
    }

    pub(crate) fn xts(&self) -> &Xts {
        &self.xts
    }
}

/// Decodes hexadecimal text.
fn bytes(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    if !text.len().is_multiple_of(2) {
        return None;
    }
    // The final capacity at once: a growing vector leaves copies.
    let mut bytes = Zeroizing::new(Vec::with_capacity(text.len() / 2));
    for pair in text.as_bytes().chunks_exact(2) {
        let [high, low] = [pair[0], pair[1]].map(|digit| char::from(digit).to_digit(16));
        bytes.push(u8::try_from(high? * 16 + low?).ok()?);
    }
    Some(bytes)
}

/// All keys, in the order of their creation.
#[derive(Default)]
pub(crate) struct Keys(RefCell<Vec<Arc<Key>>>);

impl Keys {
    pub(crate) fn add(&self, key: Arc<Key>) -> Result<(), KeyError> {
        if self.get(key.name()).is_some() {
            return Err(KeyError::Exists);
        }
        self.0.borrow_mut().push(key);
        Ok(())
    }

    pub(crate) fn get(&self, name: &str) -> Option<Arc<Key>> {
        self.0.borrow().iter().find(|key| key.name == name).cloned()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Key>> {
        self.0.borrow().clone()
    }

    /// Removes a key. Disks that use it keep it.
    pub(crate) fn remove(&self, name: &str) {
        self.0.borrow_mut().retain(|key| key.name != name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str, data: &str, tweak: &str) -> Result<Arc<Key>, KeyError> {
        let text = |text: &str| Zeroizing::new(text.to_owned());
        Key::new(name.into(), text(data), text(tweak))
    }

    #[test]
    fn keys_are_two_different_hexadecimal_numbers_of_one_length() {
        let [a, b] = ["00112233445566778899aAbBcCdDeEfF", "10112233445566778899aabbccddeeff"];
        assert!(key("k", a, b).is_ok() && key("k", &a.repeat(2), &b.repeat(2)).is_ok());
        let longer = b.repeat(2);
        let bad = format!("+{}", &b[1..]);
        let upper = a.to_uppercase();
        for (data, tweak) in [
            (a, a),
            (a, &*upper),
            (a, ""),
            ("", b),
            (a, &*longer),
            (a, &b[1..]),
            (&a[2..], &b[2..]),
            (a, &*bad),
            (a, "é0112233445566778899aabbccddeef"),
        ] {
            assert_eq!(key("k", data, tweak).err(), Some(KeyError::Invalid), "{data} {tweak}");
        }
    }

    #[test]
    fn a_key_is_not_shown_by_accident_and_its_name_is_unique() {
        let [a, b] = ["00112233445566778899aabbccddeeff", "10112233445566778899aabbccddeeff"];
        let one = key("k", a, b).unwrap();
        assert_eq!(format!("{one:?}"), "Key { name: \"k\", .. }");
        let keys = Keys::default();
        keys.add(Arc::clone(&one)).unwrap();
        assert_eq!(keys.add(one), Err(KeyError::Exists));
        keys.remove("k");
        assert!(keys.get("k").is_none() && keys.all().is_empty());
    }
}
