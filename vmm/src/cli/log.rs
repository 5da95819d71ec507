//! Logging to standard error.

use fanlight::control::requests::SetLog;
use tracing_subscriber::{filter::Targets, layer::SubscriberExt, reload, util::SubscriberInitExt};

/// Log levels.
pub const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
/// Longest filter. Parsing a longer one would delay other API clients.
const MAX_LEN: usize = 1024;

/// Starts logging what `filter` admits. Returns a function that changes the filter.
pub fn start(filter: &Targets) -> SetLog {
    let (filter, handle) = reload::Layer::new(filter.clone());
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_target(false);
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .init();
    Box::new(move |level| {
        let filter = self::filter(level)?;
        handle.reload(filter).map_err(|error| error.to_string())
    })
}

/// Reads a level, or `module=level` pairs.
pub fn filter(text: &str) -> Result<Targets, String> {
    if text.len() > MAX_LEN {
        return Err(format!("a level of more than {MAX_LEN} bytes"));
    }
    for part in text.split(',') {
        let level = part.rsplit_once('=').map_or(part, |(_, level)| level);
        // Targets would take an unknown level for a module name and disable the rest.
        if !LEVELS.iter().any(|word| word.eq_ignore_ascii_case(level)) {
            let nearest = fanlight_api::error::nearest(level, LEVELS.into_iter());
            let hint = nearest.map(|word| format!("; did you mean {word}?"));
            return Err(format!(
                "{text:?}: {level:?} is not one of {}{}",
                LEVELS.join(", "),
                hint.unwrap_or_default()
            ));
        }
    }
    text.parse().map_err(|error| format!("{text:?}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_pairs_are_read_and_mistakes_named() {
        for good in ["warn", "INFO", "off", "warn,fanlight_devices::virtio=debug"] {
            assert!(filter(good).is_ok(), "{good}");
        }
        assert_eq!(
            filter("wran").unwrap_err(),
            "\"wran\": \"wran\" is not one of off, error, warn, info, debug, trace; did you mean warn?"
        );
        for bad in ["", "fanlight", "fanlight=loud", "info,"] {
            assert!(filter(bad).is_err(), "{bad}");
        }
        let long = vec!["info"; 1000].join(",");
        assert!(filter(&long).unwrap_err().contains("1024"));
    }
}
