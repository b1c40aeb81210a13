//! The page that shows the figures, docs/counting.md: what stands between two markers is replaced.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use xtask::workspace;

/// Where the page and its plot are.
pub fn folder() -> PathBuf {
    workspace::root().join("docs")
}

/// Puts `text` between the page's markers of this name.
pub fn replace(name: &str, text: &str) -> Result<()> {
    let path = folder().join("counting.md");
    let page = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let page = between(&page, name, text)
        .with_context(|| format!("{} lacks the markers `figures: {name}`", path.display()))?;
    fs::write(&path, page).with_context(|| format!("cannot write {}", path.display()))
}

fn between(page: &str, name: &str, text: &str) -> Option<String> {
    let begin = format!("<!-- figures: {name} -->\n");
    let (before, rest) = page.split_once(&begin)?;
    let end = "<!-- end of figures -->";
    let (_, after) = rest.split_once(end)?;
    Some(format!("{before}{begin}\n{}\n\n{end}{after}", text.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::between;

    #[test]
    fn only_what_stands_between_the_markers_changes() {
        let page = "a\n<!-- figures: host -->\nold\n<!-- end of figures -->\nb\n";
        let once = between(page, "host", "new\n").unwrap();
        assert_eq!(once, "a\n<!-- figures: host -->\n\nnew\n\n<!-- end of figures -->\nb\n");
        assert_eq!(between(&once, "host", "new"), Some(once));
        assert_eq!(between(page, "ticks", "new"), None);
        assert_eq!(between("<!-- figures: host -->\nno end", "host", "new"), None);
    }
}
