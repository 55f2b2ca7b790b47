// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `lab docs`: builds the book from the pages of the repository.
//!
//! ```text
//!  docs/src/SUMMARY.md ─┐
//!  pages, manual pages ─┴─ stage: target/book/src ── mdbook ── target/book/html ── check
//! ```
//! The book has few pages of its own: it copies the repository's, so that nothing is said twice.
//! Staging moves a page and rewrites its links: to the page's place in the book, or to the
//! repository. A link that leads nowhere is an error.

mod man;
mod markdown;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::steps::{self, Steps};
use crate::{cargo_tools, programs};

/// Where to build.
#[derive(clap::Args)]
pub(crate) struct BookOptions {
    /// Directory of the built book [default: target/book/html]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

const CONFIGURATION: &str = "docs/book.toml";
const SUMMARY: &str = "docs/src/SUMMARY.md";
const MANUAL: &str = "engine/share/man/";
const LIMIT: Duration = Duration::from_secs(600);

/// Builds the book and checks its links.
pub(crate) fn run(options: &BookOptions) -> Result<()> {
    let steps = Steps::start();
    steps.begin("mdbook");
    let mdbook = cargo_tools::ensure(&cargo_tools::MDBOOK)?;
    steps.begin("pages");
    let metadata = programs::metadata()?;
    let home = metadata.target_directory.join("book");
    if home.exists() {
        fs::remove_dir_all(&home)?;
    }
    let repository = metadata.packages.into_iter().find_map(|package| package.repository);
    let repository = repository.context("no package has a `repository` in Cargo.toml")?;
    let source = Source { root: programs::workspace(), repository };
    let pages = stage(&source, &home)?;
    println!("{pages} pages");
    steps.begin("build");
    let html = match &options.out {
        Some(out) => std::path::absolute(out)?,
        None => home.join("html"),
    };
    let mut build = Command::new(mdbook);
    steps::run(build.arg("build").arg("--dest-dir").arg(&html).arg(&home), LIMIT)?;
    steps.begin("links");
    let links = check(&html)?;
    println!("{links} links lead to a page of the book\nbook: {}", html.join("index.html").display());
    Ok(())
}

/// Where pages come from.
struct Source {
    root: PathBuf,
    /// Address of the repository, for links to what is not in the book.
    repository: String,
}

/// A page of the book: where it is in the repository, and where in the book.
type Pages = BTreeMap<String, String>;

/// Writes configuration, summary, pages and images to `home`; returns the number of pages.
fn stage(source: &Source, home: &Path) -> Result<usize> {
    let to = home.join("src");
    fs::create_dir_all(&to).with_context(|| format!("cannot make {}", to.display()))?;
    fs::copy(source.root.join(CONFIGURATION), home.join("book.toml"))
        .with_context(|| format!("cannot copy {CONFIGURATION}"))?;
    let summary = source.read(SUMMARY)?;
    let (summary, pages) = source.expand(&summary)?;
    fs::write(to.join("SUMMARY.md"), summary)?;
    let mut images = BTreeSet::new();
    for (path, place) in &pages {
        let text = if path.starts_with(MANUAL) {
            source.manual_page(path, &pages)?.markdown
        } else {
            source.page(path, place, &pages, &mut images)?
        };
        write(&to.join(place), text.as_bytes())?;
    }
    for image in images {
        write(&to.join(&image), &fs::read(source.root.join(&image))?)?;
    }
    Ok(pages.len())
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let written = fs::create_dir_all(path.parent().unwrap_or(path)).and_then(|()| fs::write(path, bytes));
    written.with_context(|| format!("cannot write {}", path.display()))
}

impl Source {
    fn read(&self, path: &str) -> Result<String> {
        fs::read_to_string(self.root.join(path)).with_context(|| format!("cannot read {path}"))
    }

    /// The summary with paths of the book, and the pages that it names.
    ///
    /// A path that ends with a slash stands for all pages of that directory that no other line
    /// names. A page that does not exist is left out with a warning.
    fn expand(&self, summary: &str) -> Result<(String, Pages)> {
        let mut pages = Pages::new();
        let named: BTreeSet<&str> = summary.lines().filter_map(|line| Some(entry(line)?.2)).collect();
        let mut out = String::new();
        for line in summary.lines() {
            let Some((prefix, title, path)) = entry(line) else {
                out.push_str(&format!("{line}\n"));
                continue;
            };
            let entries = match path.strip_suffix('/') {
                Some(_) => self.directory(path, &named)?,
                None if self.root.join(path).is_file() => vec![(title.to_owned(), path.to_owned())],
                None => {
                    println!("warning: {SUMMARY} names {path}, which does not exist");
                    Vec::new()
                }
            };
            for (title, path) in entries {
                let place = place(&path);
                out.push_str(&format!("{prefix}[{title}]({place})\n"));
                if let Some((other, _)) = pages.iter().find(|(_, taken)| **taken == place) {
                    bail!("{other} and {path} are the same page of the book: rename one");
                }
                pages.insert(path, place);
            }
        }
        ensure!(!pages.is_empty(), "{SUMMARY} names no page");
        Ok((out, pages))
    }

    /// Titles and paths of the pages in the directory `path` that are not `named`.
    fn directory(&self, path: &str, named: &BTreeSet<&str>) -> Result<Vec<(String, String)>> {
        let entries = match fs::read_dir(self.root.join(path)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).with_context(|| format!("cannot read {path}")),
        };
        let mut found = Vec::new();
        for entry in entries {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let page = format!("{path}{name}");
            let wanted = if path == MANUAL { is_manual_page(&name) } else { name.ends_with(".md") };
            if !wanted || named.contains(page.as_str()) {
                continue;
            }
            let title = if path == MANUAL {
                self.manual_page(&page, &Pages::new())?.title
            } else {
                markdown::title(&self.read(&page)?).unwrap_or(name)
            };
            found.push((title, page));
        }
        // By section, then by name.
        let key = |path: &str| (path.rsplit('.').next().unwrap_or_default().to_owned(), path.to_owned());
        found.sort_by_key(|(_, path)| key(path));
        Ok(found)
    }

    fn manual_page(&self, path: &str, pages: &Pages) -> Result<man::Page> {
        let link = |name: &str, section: &str| {
            let page = format!("{name}.{section}");
            pages.contains_key(&format!("{MANUAL}{page}")).then(|| format!("{page}.html"))
        };
        man::convert(&self.read(path)?, &link).with_context(|| format!("cannot convert {path}"))
    }

    /// The page `path` as it is at `place` in the book; images that it shows are added to `images`.
    fn page(&self, path: &str, place: &str, pages: &Pages, images: &mut BTreeSet<String>) -> Result<String> {
        let included = |file: &str| self.read(&self.resolve(path, file)?);
        let text = markdown::include(&self.read(path)?, included)?;
        markdown::rewrite(&text, |address| {
            if is_absolute(address) || address.starts_with('#') {
                return Ok(address.to_owned());
            }
            let (file, anchor) = address.split_once('#').map_or((address, None), |(f, a)| (f, Some(a)));
            let target = self.resolve(path, file)?;
            let anchor = anchor.map(|anchor| format!("#{anchor}")).unwrap_or_default();
            if let Some(target) = pages.get(&target) {
                return Ok(relative(place, target) + &anchor);
            }
            if target.ends_with(".svg") || target.ends_with(".png") {
                let address = relative(place, &target);
                images.insert(target);
                return Ok(address);
            }
            let kind = if self.root.join(&target).is_dir() { "tree" } else { "blob" };
            Ok(format!("{}/{kind}/HEAD/{target}{anchor}", self.repository))
        })
    }

    /// The path in the repository of `address` in the page `path`.
    fn resolve(&self, path: &str, address: &str) -> Result<String> {
        let joined = Path::new(path).parent().unwrap_or(Path::new("")).join(address);
        let mut parts: Vec<String> = Vec::new();
        for part in joined.components() {
            match part {
                Component::ParentDir if parts.pop().is_some() => {}
                Component::Normal(name) => parts.push(name.to_string_lossy().into_owned()),
                Component::CurDir => {}
                _ => bail!("{path} links to {address}, outside of the repository"),
            }
        }
        let target = parts.join("/");
        if !self.root.join(&target).exists() {
            bail!("{path} links to {address}, which does not exist");
        }
        Ok(target)
    }
}

/// What comes before the link of a line of the summary, its title and its path.
fn entry(line: &str) -> Option<(&str, &str, &str)> {
    let at = line.find('[')?;
    let (title, rest) = line[at + 1..].split_once("](")?;
    let plain = line[..at].chars().all(|c| c == ' ' || c == '-');
    plain.then_some((&line[..at], title, rest.strip_suffix(')')?))
}

fn is_manual_page(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, section)| matches!(section, "1" | "7" | "8"))
}

/// Where the page `path` of the repository is in the book.
fn place(path: &str) -> String {
    if path == "README.md" {
        return "index.md".into();
    }
    let short = ["docs/src/", "engine/doc/", "engine/share/", "engine/"]
        .iter()
        .find_map(|prefix| path.strip_prefix(prefix))
        .unwrap_or(path);
    // mdbook makes an index of every README.
    let short = short.strip_suffix("/README.md").map_or(short.to_owned(), |short| format!("{short}.md"));
    let lower = short.to_lowercase();
    if lower.ends_with(".md") { lower } else { format!("{lower}.md") }
}

/// The address of `target` in the page `from`, both from the root of the book.
fn relative(from: &str, target: &str) -> String {
    "../".repeat(from.matches('/').count()) + target
}

fn is_absolute(address: &str) -> bool {
    let scheme = address.split_once(':').map(|(scheme, _)| scheme);
    scheme.is_some_and(|scheme| scheme.chars().all(|c| c.is_ascii_alphanumeric())) || address.starts_with('<')
}

/// Checks that each link of the built book to itself leads to a page and an anchor; their number.
fn check(html: &Path) -> Result<usize> {
    let mut pages = BTreeMap::new();
    collect(html, html, &mut pages)?;
    let mut links = 0;
    let mut broken = Vec::new();
    for (page, text) in &pages {
        for address in attributes(text, "href").chain(attributes(text, "src")) {
            if is_absolute(address) || address.starts_with("//") || address.is_empty() {
                continue;
            }
            links += 1;
            let (file, anchor) = address.split_once('#').unwrap_or((address, ""));
            let target = if file.is_empty() { Some(page.clone()) } else { join(page, file) };
            let found = target.as_ref().is_some_and(|target| match pages.get(target) {
                Some(text) => anchor.is_empty() || attributes(text, "id").any(|id| id == anchor),
                None => html.join(target).is_file(),
            });
            if !found {
                broken.push(format!("{page}: {address}"));
            }
        }
    }
    broken.dedup();
    ensure!(broken.is_empty(), "the book has broken links:\n  {}", broken.join("\n  "));
    Ok(links)
}

/// HTML files below `directory`, by their path from `root`.
fn collect(root: &Path, directory: &Path, pages: &mut BTreeMap<String, String>) -> Result<()> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        // The page for addresses that do not exist, and the page that is all pages in one.
        let special =
            path.ends_with("404.html") || path.ends_with("print.html") || path.ends_with("toc.html");
        if path.is_dir() {
            collect(root, &path, pages)?;
        } else if path.extension().is_some_and(|extension| extension == "html") && !special {
            let name = path.strip_prefix(root)?.to_string_lossy().into_owned();
            pages.insert(name, fs::read_to_string(&path)?);
        }
    }
    Ok(())
}

/// Values of the attribute `name`.
fn attributes<'a>(html: &'a str, name: &str) -> impl Iterator<Item = &'a str> {
    let begin = format!(" {name}=\"");
    html.match_indices(&begin)
        .map(|(at, found)| &html[at + found.len()..])
        .filter_map(|rest| rest.split('"').next())
        .collect::<Vec<_>>()
        .into_iter()
}

fn join(page: &str, address: &str) -> Option<String> {
    let mut parts: Vec<&str> = page.split('/').collect();
    parts.pop();
    for part in address.split('/') {
        match part {
            ".." => drop(parts.pop()?),
            "." => {}
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> Source {
        Source { root: programs::workspace(), repository: "https://example.org/r".into() }
    }

    /// Links of all pages lead to files that exist; this needs no mdbook.
    #[test]
    fn stages_all_pages_of_the_repository() {
        let home = tempfile::tempdir().unwrap();
        assert!(stage(&source(), home.path()).unwrap() > 10);
        let summary = fs::read_to_string(home.path().join("src/SUMMARY.md")).unwrap();
        assert!(summary.contains("[loopengine-run(1)](man/loopengine-run.1.md)"), "{summary}");
        for (_, _, path) in summary.lines().filter_map(entry) {
            assert!(home.path().join("src").join(path).is_file(), "{path}");
        }
    }

    #[test]
    fn rewrites_links_to_pages_images_and_sources() {
        let root = tempfile::tempdir().unwrap();
        let source = Source { root: root.path().to_owned(), ..source() };
        fs::create_dir_all(root.path().join("engine/doc")).unwrap();
        fs::create_dir(root.path().join("src")).unwrap();
        let text = "[a](../../README.md#x) ![b](p.svg) [c](../../src) [d](https://e.org) [e](#f)";
        fs::write(root.path().join("engine/doc/a.md"), text).unwrap();
        fs::write(root.path().join("engine/doc/p.svg"), "").unwrap();
        fs::write(root.path().join("README.md"), "").unwrap();
        let pages: Pages = [("README.md".to_owned(), "index.md".to_owned())].into();
        let mut images = BTreeSet::new();
        let page = source.page("engine/doc/a.md", "design/a.md", &pages, &mut images).unwrap();
        assert_eq!(
            page,
            "[a](../index.md#x) ![b](../engine/doc/p.svg) [c](https://example.org/r/tree/HEAD/src) \
             [d](https://e.org) [e](#f)"
        );
        fs::write(root.path().join("engine/doc/a.md"), "[a](gone.md)").unwrap();
        let error = source.page("engine/doc/a.md", "a.md", &pages, &mut images).unwrap_err().to_string();
        assert_eq!(error, "engine/doc/a.md links to gone.md, which does not exist");
    }

    #[test]
    fn places_pages_without_their_directories() {
        let paths = [
            "README.md",
            "SECURITY.md",
            "engine/doc/design/ring.md",
            "engine/share/man/a.1",
            "results/README.md",
        ];
        assert_eq!(
            paths.map(place),
            ["index.md", "security.md", "design/ring.md", "man/a.1.md", "results.md"]
        );
    }

    #[test]
    fn finds_broken_links_of_the_built_book() {
        let html = tempfile::tempdir().unwrap();
        fs::create_dir(html.path().join("d")).unwrap();
        let write = |name: &str, text: &str| fs::write(html.path().join(name), text).unwrap();
        write("a.html", "<a href=\"d/b.html#x\"> <a href=\"https://e.org\"> <h1 id=\"top\">");
        write("d/b.html", "<h2 id=\"x\"> <a href=\"../a.html#top\">");
        assert_eq!(check(html.path()).unwrap(), 2);
        write("d/b.html", "<h2 id=\"y\"> <a href=\"../c.html\">");
        let error = check(html.path()).unwrap_err().to_string();
        assert!(error.contains("a.html: d/b.html#x") && error.contains("d/b.html: ../c.html"), "{error}");
    }
}
