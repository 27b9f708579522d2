//! Answers as text: one table, printed for people or as JSON for programs, from the same rows.

use crate::exit::{Exit, refusal_text};
use ambit_model::Refusal;
use comfy_table::{ContentArrangement, Table as Grid, presets};
use serde_json::{Map, Value};
use std::io::Write;
use std::process::ExitCode;

/// The form of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Form {
    /// Columns for people.
    Table,
    /// JSON, with stable names, for programs.
    Json,
}

/// What a verb has to say. `text` goes to standard output alone, `notes` to standard error.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// Standard output.
    pub text: String,
    /// Standard error, a line each.
    pub notes: Vec<String>,
    /// How the program ends.
    pub exit: Exit,
}

impl Answer {
    /// An answer that holds.
    pub fn ok(text: impl Into<String>) -> Answer {
        Answer { text: text.into(), notes: Vec::new(), exit: Exit::Ok }
    }
    /// The same answer with a line for standard error.
    #[must_use]
    pub fn note(mut self, line: impl Into<String>) -> Answer {
        self.notes.push(line.into());
        self
    }
    /// The same answer with another end.
    #[must_use]
    pub fn ending(mut self, exit: Exit) -> Answer {
        self.exit = exit;
        self
    }
}

/// Rows under named columns. The names are the keys in JSON and, in capitals, the heads of the table.
pub struct Table {
    noun: &'static str,
    columns: &'static [&'static str],
    rows: Vec<Vec<Value>>,
}

impl Table {
    /// An empty table of things called `noun` (singular).
    pub fn new(noun: &'static str, columns: &'static [&'static str]) -> Table {
        Table { noun, columns, rows: Vec::new() }
    }
    /// Adds a row; its cells stand in the order of the columns.
    pub fn row(&mut self, cells: Vec<Value>) {
        debug_assert_eq!(cells.len(), self.columns.len());
        self.rows.push(cells);
    }
    /// The table with its count below, or a JSON array of objects.
    pub fn render(&self, form: Form) -> String {
        match form {
            Form::Json => {
                let objects = self.rows.iter().map(|row| Value::Object(self.object(row)));
                pretty(&Value::Array(objects.collect()))
            }
            Form::Table => self.grid(),
        }
    }

    /// One row as `key: value` lines, or one JSON object.
    pub fn render_one(&self, form: Form) -> String {
        let Some(row) = self.rows.first() else { return String::new() };
        match form {
            Form::Json => pretty(&Value::Object(self.value_of_one())),
            Form::Table => {
                let width = self.columns.iter().map(|c| c.len()).max().unwrap_or(0) + 1;
                let line = |(name, cell): (&&str, &Value)| format!("{:width$} {}", format!("{name}:"), plain(cell));
                let lines: Vec<String> = self.columns.iter().zip(row).map(line).collect();
                lines.iter().map(|l| l.trim_end()).collect::<Vec<_>>().join("\n")
            }
        }
    }

    /// One row as a JSON object, to be told with more.
    pub fn value_of_one(&self) -> Map<String, Value> {
        self.rows.first().map(|row| self.object(row)).unwrap_or_default()
    }

    fn object(&self, row: &[Value]) -> Map<String, Value> {
        self.columns.iter().map(|c| (*c).to_owned()).zip(row.iter().cloned()).collect()
    }

    fn grid(&self) -> String {
        let mut out = String::new();
        if !self.rows.is_empty() {
            let mut grid = Grid::new();
            // Never truncated nor wrapped: what is cut off cannot be copied into the next command.
            grid.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
            grid.set_header(self.columns.iter().map(|c| c.replace('_', " ").to_uppercase()));
            for row in &self.rows {
                grid.add_row(row.iter().map(plain));
            }
            for line in grid.lines() {
                out.push_str(line.strip_prefix(' ').unwrap_or(&line).trim_end());
                out.push('\n');
            }
        }
        out.push_str(&counted(self.rows.len(), self.noun));
        out
    }
}

/// `1 node`, `2 nodes`, `3 policies`, `4 identities`.
pub fn counted(n: usize, noun: &str) -> String {
    match (n, noun.strip_suffix('y')) {
        (1, _) => format!("1 {noun}"),
        (_, Some(stem)) => format!("{n} {stem}ies"),
        (_, None) => format!("{n} {noun}s"),
    }
}

/// Indented JSON.
pub fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).unwrap_or_else(|_| value.to_string())
}

fn plain(cell: &Value) -> String {
    match cell {
        Value::String(s) if s.is_empty() => "-".to_owned(),
        Value::String(s) => s.clone(),
        Value::Null => "-".to_owned(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::Array(items) if items.is_empty() => "-".to_owned(),
        Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

/// Writes an answer or a refusal where each belongs. A closed pipe is no error of ours.
pub fn print(result: Result<Answer, Refusal>) -> ExitCode {
    let (text, notes, exit) = match result {
        Ok(answer) => (answer.text, answer.notes, answer.exit),
        Err(refusal) => (String::new(), vec![refusal_text(&refusal)], Exit::of(&refusal)),
    };
    for line in notes {
        let _ = writeln!(std::io::stderr(), "{line}");
    }
    if !text.is_empty() {
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(text.as_bytes());
        if !text.ends_with('\n') {
            let _ = out.write_all(b"\n");
        }
    }
    exit.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn two_rows() -> Table {
        let mut table = Table::new("node", &["id", "cluster", "last_seen", "connected"]);
        table.row(vec![json!("aa"), json!("west"), json!(""), json!(true)]);
        table.row(vec![json!("bbbb"), json!("east-long-name"), json!("5s"), json!(false)]);
        table
    }

    #[test]
    fn a_table_has_heads_rows_and_a_count() {
        let golden = "ID    CLUSTER         LAST SEEN  CONNECTED\n\
                      aa    west            -          yes\n\
                      bbbb  east-long-name  5s         no\n\
                      2 nodes";
        assert_eq!(two_rows().render(Form::Table), golden);
        assert_eq!(Table::new("policy", &["name"]).render(Form::Table), "0 policies");
    }

    #[test]
    fn json_uses_the_column_names() {
        let value: Value = serde_json::from_str(&two_rows().render(Form::Json)).unwrap();
        assert_eq!(value[1], json!({"id": "bbbb", "cluster": "east-long-name", "last_seen": "5s", "connected": false}));
        let one: Value = serde_json::from_str(&two_rows().render_one(Form::Json)).unwrap();
        assert_eq!(one["id"], "aa");
    }

    #[test]
    fn one_row_reads_as_lines() {
        assert_eq!(two_rows().render_one(Form::Table), "id:        aa\ncluster:   west\nlast_seen: -\nconnected: yes");
    }
}
