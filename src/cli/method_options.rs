//! The flags of the methods, made from their own list of options: a new method or option needs nothing here.

use clap::builder::{BoolishValueParser, PossibleValuesParser, TypedValueParser};
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use megafuse::Result;
use megafuse::pipeline::{METHODS, Method, MethodSpec, OptionKind, Request, Stage};
use serde_json::{Map, Value};

use super::flags;

/// `--method`
#[derive(Clone, Copy, Debug, Default)]
pub struct MethodChoice(pub Option<&'static MethodSpec>);

impl Args for MethodChoice {
    fn augment_args(command: Command) -> Command {
        let methods: Vec<String> = METHODS.iter().map(|spec| format!("{}: {}.", spec.name, spec.summary)).collect();
        let suited = Request::default_method_text();
        let long = format!("How the picture gets its size\n\n{}\n{suited}", methods.join("\n"));
        command.arg(
            Arg::new("method")
                .long("method")
                .value_name("METHOD")
                .help("How the picture gets its size")
                .long_help(long)
                .value_parser(PossibleValuesParser::new(METHODS.iter().map(|spec| spec.name))),
        )
    }

    fn augment_args_for_update(command: Command) -> Command {
        MethodChoice::augment_args(command)
    }
}

impl FromArgMatches for MethodChoice {
    fn from_arg_matches(matches: &ArgMatches) -> std::result::Result<MethodChoice, clap::Error> {
        let name = matches.get_one::<String>("method");
        Ok(MethodChoice(name.and_then(|name| MethodSpec::find(name).ok())))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> std::result::Result<(), clap::Error> {
        *self = MethodChoice::from_arg_matches(matches)?;
        Ok(())
    }
}

/// The options of methods that were given, by their names.
#[derive(Clone, Debug, Default)]
pub struct MethodOptions {
    pub given: Map<String, Value>,
}

impl MethodOptions {
    /// The method with those of the options that it reads in a run with these stages.
    ///
    /// # Errors
    /// [`megafuse::Error::Request`]: a value does not fit.
    pub fn of(&self, spec: &'static MethodSpec, stages: &[Stage]) -> Result<Method> {
        let known = self.given.iter().filter(|(name, _)| spec.reads(name, stages));
        Method::with_options(spec, known.map(|(name, value)| (name.clone(), value.clone())).collect())
    }
}

/// Every option once, by name, in the order of the methods.
fn options() -> Vec<&'static megafuse::pipeline::OptionSpec> {
    let mut all: Vec<&megafuse::pipeline::OptionSpec> = Vec::new();
    for option in METHODS.iter().flat_map(|spec| spec.options) {
        if !all.iter().any(|known| known.name == option.name) {
            all.push(option);
        }
    }
    all
}

impl Args for MethodOptions {
    fn augment_args(command: Command) -> Command {
        options().into_iter().fold(command, |command, option| {
            let help = flags::named(option.help);
            let summary = help.split('\n').next().unwrap_or_default().to_string();
            let arg = Arg::new(option.name)
                .long(flags::long(option.name))
                .help(summary)
                .long_help(help)
                .help_heading(option.heading);
            let kind = option.kind;
            let text = move |text: &str| kind.parse(text);
            command.arg(match kind {
                OptionKind::Switch => arg.action(ArgAction::SetTrue).value_parser(BoolishValueParser::new()),
                OptionKind::Bool => arg
                    .value_name(option.value_name)
                    .value_parser(PossibleValuesParser::new(["true", "false"]).try_map(move |name| kind.parse(&name))),
                OptionKind::Choice(names) => arg
                    .value_name(option.value_name)
                    .value_parser(PossibleValuesParser::new(names).try_map(move |name| kind.parse(&name))),
                OptionKind::Share
                | OptionKind::Integer { .. }
                | OptionKind::Number { .. }
                | OptionKind::Numbers { .. }
                | OptionKind::Text { .. } => {
                    arg.value_name(option.value_name).allow_negative_numbers(true).value_parser(text)
                }
            })
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        MethodOptions::augment_args(command)
    }
}

impl FromArgMatches for MethodOptions {
    fn from_arg_matches(matches: &ArgMatches) -> std::result::Result<MethodOptions, clap::Error> {
        let mut given = Map::new();
        for option in options() {
            let value = match option.kind {
                OptionKind::Switch => matches.get_flag(option.name).then_some(Value::Bool(true)),
                _ => matches.get_one::<Value>(option.name).cloned(),
            };
            if let Some(value) = value {
                given.insert(option.name.into(), value);
            }
        }
        Ok(MethodOptions { given })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> std::result::Result<(), clap::Error> {
        *self = MethodOptions::from_arg_matches(matches)?;
        Ok(())
    }
}
