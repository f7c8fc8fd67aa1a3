//! Enums whose values have one name everywhere: on the command line, in JSON, in a picture's text and in errors.

/// Gives an enum its names: `ALL`, `NAMES`, `name`, [`Display`](std::fmt::Display), [`FromStr`](std::str::FromStr) and
/// serde.
macro_rules! named {
    ($type:ident, [$($variant:ident => $name:literal),+ $(,)?]) => {
        impl $type {
            pub const ALL: &[$type] = &[$($type::$variant),+];

            /// The names of all values, in the order of [`ALL`](Self::ALL).
            pub const NAMES: &[&str] = &[$($name),+];

            pub fn name(self) -> &'static str {
                match self {
                    $($type::$variant => $name),+
                }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }

        impl std::str::FromStr for $type {
            type Err = $crate::Error;
            fn from_str(text: &str) -> $crate::Result<$type> {
                $type::ALL.iter().copied().find(|value| value.name() == text).ok_or_else(|| {
                    let wanted = $crate::names::one_of($type::NAMES);
                    $crate::Error::argument(stringify!($type), "the name", format!("{text:?}"), wanted)
                })
            }
        }

        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
                serializer.serialize_str(self.name())
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<$type, D::Error> {
                let name = <String as serde::Deserialize>::deserialize(deserializer)?;
                let wanted = || format!("{name:?} is unknown, expected {}", $crate::names::one_of($type::NAMES));
                let found = $type::ALL.iter().copied().find(|value| value.name() == name);
                found.ok_or_else(|| serde::de::Error::custom(wanted()))
            }
        }
    };
}
pub(crate) use named;

/// `a, b or c`
pub(crate) fn one_of(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [one] => one.to_string(),
        [others @ .., last] => format!("{} or {last}", others.join(", ")),
    }
}
