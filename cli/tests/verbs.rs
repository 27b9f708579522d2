//! Every `ambit ...` line in README.md and CONTRIBUTING.md is one that the command line takes.

use ambit::args::Args;
use clap::Parser;
use std::path::Path;

/// Lines of code blocks that start with `ambit `, and inline code that does.
fn commands(markdown: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut in_block = false;
    for line in markdown.lines() {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
        } else if in_block {
            let line = line.trim();
            let line = line.strip_prefix("$ ").or_else(|| line.strip_prefix("# ")).unwrap_or(line);
            found.extend(line.strip_prefix("ambit ").map(str::to_owned));
        } else {
            let code = line.split('`').skip(1).step_by(2);
            found.extend(code.filter_map(|c| c.strip_prefix("ambit ")).map(str::to_owned));
        }
    }
    // Without what the shell takes for itself: a comment, a pipe, a redirection.
    let shell = [" #", " | ", " > "];
    let plain = |c: &String| {
        shell.iter().fold(c.as_str(), |c, sign| c.split(sign).next().unwrap_or_default()).trim().to_owned()
    };
    found.iter().map(plain).filter(|c| !c.is_empty()).collect()
}

/// Whether the line parses, or at least names verbs that exist: prose says `ambit drill run` without its file.
fn taken(command: &str) -> Result<(), String> {
    let words = std::iter::once("ambit").chain(command.split_whitespace().map(|w| w.trim_matches(['"', '\''])));
    match Args::try_parse_from(words) {
        Ok(_) => Ok(()),
        Err(e) => {
            use clap::error::ErrorKind::{
                DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion, MissingRequiredArgument,
            };
            match e.kind() {
                MissingRequiredArgument | DisplayHelp | DisplayVersion | DisplayHelpOnMissingArgumentOrSubcommand => {
                    Ok(())
                }
                _ => Err(format!("ambit {command}: {e}")),
            }
        }
    }
}

#[test]
fn documented_commands_are_taken() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut checked = 0;
    for document in ["README.md", "CONTRIBUTING.md"] {
        let text = std::fs::read_to_string(root.join(document)).unwrap();
        for command in commands(&text) {
            taken(&command).unwrap();
            checked += 1;
        }
    }
    assert!(checked > 0, "no command found: is the reader of documents broken?");
}

#[test]
fn the_reader_finds_commands_and_wrong_ones_fail() {
    let text = "Run `ambit status` or `cargo x`.\n```sh\n$ ambit node list   # all\nambit nod list | cat\n```\n";
    assert_eq!(commands(text), ["status", "node list", "nod list"]);
    assert!(taken("status").is_ok() && taken("drill run").is_ok());
    assert!(taken("nod list").is_err() && taken("status --colour").is_err());
}
