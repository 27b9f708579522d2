//! The figures of one run. A target that is missed is shown as missed; it fails nothing.

use serde::Serialize;

#[derive(Serialize)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    pub(crate) target: Option<f64>,
}

impl Figure {
    /// Targets are upper bounds.
    pub(crate) fn met(&self) -> Option<bool> {
        self.target.map(|t| self.value <= t)
    }
}

#[derive(Default)]
pub(crate) struct Figures {
    pub(crate) rows: Vec<Figure>,
    pub(crate) load: String,
}

impl Figures {
    pub(crate) fn put(&mut self, name: impl Into<String>, value: f64, unit: &'static str, target: Option<f64>) {
        self.rows.push(Figure { name: name.into(), value, unit, target });
        // The load that the figure was taken under is the latest one.
        let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        self.load = text.split(' ').take(3).collect::<Vec<_>>().join(" ");
    }

    pub(crate) fn json(&self) -> String {
        let figures: Vec<_> = self
            .rows
            .iter()
            .map(|f| {
                serde_json::json!({
                    "name": f.name, "ours": f.value, "unit": f.unit, "target": f.target, "met": f.met(),
                    "load_average": self.load,
                })
            })
            .collect();
        format!("{:#}\n", serde_json::json!({ "figures": figures }))
    }
}
