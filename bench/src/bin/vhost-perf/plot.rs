//! The results as an SVG: the distribution of latencies, and IOPS and longest gap over time.

use std::error::Error;
use std::path::Path;

use bench::perf::{Latencies, Outcome, Plan, Stretch};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::report;

const SIZE: (u32, u32) = (960, 960);
const FONT: &str = "sans-serif";
const READS: RGBColor = RGBColor(0x1f, 0x6f, 0xb4);
const WRITES: RGBColor = RGBColor(0xd8, 0x6a, 0x1c);
const GAPS: RGBColor = RGBColor(0xb0, 0x2a, 0x37);
const GRID: RGBColor = RGBColor(0xe4, 0xe4, 0xe4);
const TEXT: RGBColor = RGBColor(0x33, 0x33, 0x33);
/// Points of a line of the distribution.
const POINTS: u32 = 480;
/// Nines on the percentile axis. More nines would stand for too few requests.
const NINES: std::ops::RangeInclusive<f64> = 2.0..=7.0;

type Result<T> = std::result::Result<T, Box<dyn Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws `outcome` into an SVG file at `path`.
pub(crate) fn draw(plan: &Plan, outcome: &Outcome, path: &Path) -> Result<()> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let (head, rest) = root.split_vertically(64);
        let title = (FONT, 24).into_font().color(&TEXT);
        head.draw(&Text::new(report::title(plan), (24, 16), title))?;
        let (first, second) = (headline(outcome), (FONT, 15).into_font().color(&TEXT));
        head.draw(&Text::new(first, (24, 46), second))?;
        let (distribution, rest) = rest.split_vertically(420);
        let (iops, gaps) = rest.split_vertically(238);
        draw_distribution(&distribution, outcome)?;
        let caption = "IOPS";
        draw_over_time(&iops, caption, outcome, |s| s.iops, (READS, report::count))?;
        let caption = "Longest gap without a completion";
        draw_over_time(&gaps, caption, outcome, |s| s.longest_gap_ns as f64, (GAPS, report::time))?;
        root.present()?;
    }
    Ok(std::fs::write(path, svg)?)
}

fn headline(outcome: &Outcome) -> String {
    let p = |percent| report::time(outcome.all.ns.percentile(percent) as f64);
    let gap = outcome.longest_gap().map_or(0, |gap| gap.1);
    format!(
        "{} IOPS, p50 {}, p99 {}, p99.99 {}, longest gap {}",
        report::count(outcome.iops()),
        p(50.0),
        p(99.0),
        p(99.99),
        report::time(gap as f64)
    )
}

/// Draws latency by percentile. Each nine has the same width.
fn draw_distribution(area: &Area<'_>, outcome: &Outcome) -> Result<()> {
    let nines = (outcome.all.completed.max(1) as f64).log10().ceil();
    let nines = nines.clamp(*NINES.start(), *NINES.end());
    let lines: Vec<(&str, RGBColor, &Latencies)> =
        [("reads", READS, &outcome.reads), ("writes", WRITES, &outcome.writes)]
            .into_iter()
            .filter(|(_, _, latencies)| latencies.completed > 0)
            .collect();
    let (min, max) = (outcome.all.ns.min.max(1) as f64, outcome.all.ns.max.max(2) as f64);
    let mut chart = ChartBuilder::on(area)
        .caption("Latency by percentile", (FONT, 17).into_font().color(&TEXT))
        .margin(12)
        .margin_right(44)
        .x_label_area_size(34)
        .y_label_area_size(78)
        .build_cartesian_2d(0.0..nines, (min / 1.2..max * 1.3).log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(GRID)
        .axis_style(TEXT)
        .label_style((FONT, 14).into_font().color(&TEXT))
        .x_labels(whole(nines) + 1)
        .y_labels(6)
        .x_label_formatter(&|x| percentile_label(*x))
        .y_label_formatter(&|ns| report::time(*ns))
        .draw()?;
    for (name, color, latencies) in lines {
        // Up to the percentile of a single request.
        let end = (latencies.completed as f64).log10().clamp(0.0, nines);
        let points = (0..=POINTS).map(|i| {
            let x = end * f64::from(i) / f64::from(POINTS);
            let percent = 100.0 * (1.0 - 10_f64.powf(-x));
            (x, latencies.ns.percentile(percent).max(1) as f64)
        });
        chart
            .draw_series(LineSeries::new(points, color.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font((FONT, 14).into_font().color(&TEXT))
        .background_style(WHITE)
        .border_style(GRID)
        .draw()?;
    Ok(())
}

#[expect(clippy::cast_possible_truncation, reason = "0 to 7 nines")]
fn whole(nines: f64) -> usize {
    nines.round() as usize
}

/// The percentile that a number of nines stands for.
fn percentile_label(nines: f64) -> String {
    match whole(nines) {
        0 => "0 %".into(),
        1 => "90 %".into(),
        2 => "99 %".into(),
        nines => format!("99.{} %", "9".repeat(nines - 2)),
    }
}

/// Draws one value of each stretch of the time line, on an axis from zero.
fn draw_over_time(
    area: &Area<'_>,
    caption: &str,
    outcome: &Outcome,
    value: impl Fn(&Stretch) -> f64,
    (color, label): (RGBColor, fn(f64) -> String),
) -> Result<()> {
    let seconds = outcome.elapsed.as_secs_f64().max(0.001);
    let max = outcome.timeline.iter().map(&value).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption(caption, (FONT, 17).into_font().color(&TEXT))
        .margin(12)
        .margin_right(44)
        .x_label_area_size(34)
        .y_label_area_size(78)
        .build_cartesian_2d(0.0..seconds, 0.0..max * 1.1)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .bold_line_style(GRID)
        .axis_style(TEXT)
        .label_style((FONT, 14).into_font().color(&TEXT))
        .x_labels(11)
        .y_labels(6)
        .x_label_formatter(&|s| format!("{} s", (s * 100.0).round() / 100.0))
        .y_label_formatter(&|value| label(*value))
        .draw()?;
    // The line consists of steps, because each value holds for a whole stretch.
    let ends = outcome.timeline.iter().skip(1).map(|s| s.at_s).chain([seconds]);
    let steps = outcome.timeline.iter().zip(ends);
    let points = steps.flat_map(|(s, end)| [(s.at_s, value(s)), (end, value(s))]);
    let area = AreaSeries::new(points, 0.0, color.mix(0.2)).border_style(color.stroke_width(1));
    chart.draw_series(area)?;
    Ok(())
}
