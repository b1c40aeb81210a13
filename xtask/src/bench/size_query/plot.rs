//! The cost of a query over the number of guests, both axes logarithmic.

use anyhow::{Context, Result};
use plotters::prelude::*;

use super::Figures;

const SIZE: (u32, u32) = (760, 460);
/// Guests, from and to. A way that knows no guests has been measured once and is drawn level.
const GUESTS: (f64, f64) = (1.0, 1000.0);
/// The ways that are drawn, with their colours: the others would lie on top of these.
const DRAWN: &[(&str, RGBColor)] = &[
    ("locks", RGBColor(0xc0, 0x39, 0x2b)),
    ("shared", RGBColor(0x7f, 0x8c, 0x8d)),
    ("percpu-read-4", RGBColor(0xb9, 0x77, 0x0e)),
    ("percpu-sum-64", RGBColor(0x8e, 0x44, 0xad)),
    ("ours-64", RGBColor(0x1f, 0x61, 0x8d)),
    ("ours-4", RGBColor(0x1e, 0x84, 0x49)),
];

/// A way's line: its name in the legend, its colour, its points (guests, nanoseconds).
struct Line {
    label: String,
    colour: RGBColor,
    points: Vec<(f64, f64)>,
}

/// The plot, as an SVG file.
pub fn svg(figures: &[Figures]) -> Result<String> {
    let mut text = String::new();
    draw(SVGBackend::with_string(&mut text, SIZE).into_drawing_area(), &lines(figures)?)?;
    Ok(text)
}

fn lines(figures: &[Figures]) -> Result<Vec<Line>> {
    DRAWN.iter().map(|&(name, colour)| line(figures, name, colour)).collect()
}

fn line(figures: &[Figures], name: &str, colour: RGBColor) -> Result<Line> {
    if name == "locks" {
        let locks = figures.iter().filter(|way| way.way().0 == name);
        let points = locks.filter_map(|way| Some((way.way().1? as f64, way.query_ns))).collect();
        return Ok(Line { label: "locks of 2010".into(), colour, points });
    }
    let way = figures.iter().find(|way| way.name == name).with_context(|| format!("no figure for {name}"))?;
    let points = vec![(GUESTS.0, way.query_ns), (GUESTS.1, way.query_ns)];
    Ok(Line { label: way.label(), colour, points })
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn draw(area: Area<'_>, lines: &[Line]) -> Result<()> {
    let costs = || lines.iter().flat_map(|line| &line.points).map(|point| point.1);
    let (least, most) = (costs().fold(f64::MAX, f64::min), costs().fold(0.0, f64::max));
    // Whole powers of ten around all of them.
    let powers = |value: f64| 10f64.powf(value);
    let ends = powers(least.log10().floor())..powers(most.log10().ceil());
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d((GUESTS.0..GUESTS.1).log_scale(), ends.log_scale())?;
    chart
        .configure_mesh()
        .x_desc("guests")
        .y_desc("a query, ns")
        .light_line_style(RGBColor(0xf2, 0xf2, 0xf2))
        .label_style(("sans-serif", 14))
        .x_label_formatter(&|guests| format!("{guests:.0}"))
        .y_label_formatter(&|ns| format!("{ns}"))
        .draw()?;
    for Line { label, colour, points } in lines {
        let style = colour.stroke_width(2);
        chart
            .draw_series(LineSeries::new(points.iter().copied(), style).point_size(3))?
            .label(label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.9))
        .border_style(RGBColor(0xcc, 0xcc, 0xcc))
        .label_font(("sans-serif", 14))
        .draw()?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_drawn_is_in_the_legend() {
        let names =
            ["locks-1", "locks-1000", "shared", "percpu-read-4", "percpu-sum-64", "ours-4", "ours-64"];
        let mut figures: Vec<_> = names
            .iter()
            .zip(1..)
            .map(|(name, ns)| Figures { name: (*name).into(), query_ns: f64::from(ns), ..Figures::default() })
            .collect();
        let text = svg(&figures).unwrap();
        for word in ["locks of 2010", "one shared number", "ours, 4 cores", "ours, 64 cores", "guests"] {
            assert!(text.contains(word), "{word}");
        }
        figures.pop();
        assert!(svg(&figures).is_err());
    }
}
