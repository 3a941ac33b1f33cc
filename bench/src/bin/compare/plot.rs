//! The results of a comparison as an SVG: latency and throughput over depth for each disk, and
//! below, the throughput of each cell relative to each other server.

use std::ops::Range;

use anyhow::Result;
use bench::Spread;
use bench::markdown::{count, digits, time};
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::coord::types::RangedCoordi32;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::Findings;
use crate::cells::{Cell, DiskKind};
use crate::measure::Measured;
use crate::perf::Figures;

const WIDTH: u32 = 1120;
const HEADER: u32 = 76;
const PANEL: u32 = 290;
/// The space above and below the lines of the ratios.
const RATIO_FRAME: u32 = 92;
const RATIO_LINE: u32 = 24;

const INK: RGBColor = RGBColor(31, 41, 55);
const PALE: RGBColor = RGBColor(107, 114, 128);
const GRID: RGBColor = RGBColor(229, 231, 235);
/// Colours of the contenders, in their order.
const COLOURS: [RGBColor; 6] = [
    RGBColor(37, 99, 235),
    RGBColor(234, 88, 12),
    RGBColor(5, 150, 105),
    RGBColor(147, 51, 234),
    RGBColor(219, 39, 119),
    RGBColor(120, 113, 108),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// Draws `findings`.
///
/// # Errors
/// Those of plotters; drawing into memory has none.
pub(crate) fn svg(findings: &Findings) -> Result<String> {
    let disks: Vec<Vec<&Measured>> =
        DiskKind::ALL.iter().map(|&disk| over_depth(findings, disk)).collect();
    let disks: Vec<_> = disks.into_iter().filter(|cells| !cells.is_empty()).collect();
    let ratios = if findings.contenders().len() > 1 {
        RATIO_FRAME + RATIO_LINE * u32::try_from(findings.cells.len())?
    } else {
        0
    };
    let height = HEADER + PANEL * u32::try_from(disks.len())? + ratios;
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, (WIDTH, height)).into_drawing_area();
        root.fill(&WHITE)?;
        let (head, mut rest) = root.split_vertically(HEADER);
        header(&head, findings)?;
        for cells in disks {
            let (row, below) = rest.split_vertically(PANEL);
            rest = below;
            let (left, right) = row.split_horizontally(WIDTH / 2);
            let p50 = |figures: &Figures| figures.p50_ns;
            panel(&left, findings, &cells, "median latency", time, p50)?;
            panel(&right, findings, &cells, "IOPS", count, |figures| figures.iops)?;
        }
        if ratios > 0 {
            ratio_panel(&rest, findings)?;
        }
        root.present()?;
    }
    Ok(text)
}

/// The cells of `disk` that differ in depth only: the largest such group, in order of depth.
fn over_depth(findings: &Findings, disk: DiskKind) -> Vec<&Measured> {
    let of_disk: Vec<&Measured> =
        findings.cells.iter().filter(|measured| measured.cell.disk == disk).collect();
    let group = |first: &Measured| {
        let like = |cell: Cell| Cell { depth: first.cell.depth, ..cell } == first.cell;
        of_disk.iter().copied().filter(|measured| like(measured.cell)).collect::<Vec<_>>()
    };
    // Of groups of equal size, the first one, whose options are closest to the defaults.
    let mut best = Vec::new();
    for first in &of_disk {
        let cells = group(first);
        if cells.len() > best.len() {
            best = cells;
        }
    }
    best.sort_by_key(|measured| measured.cell.depth);
    best
}

fn font(size: i32, colour: RGBColor) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&colour)
}

fn colour(server: usize) -> RGBColor {
    COLOURS[server % COLOURS.len()]
}

/// The title and the legend.
fn header(area: &Area<'_>, findings: &Findings) -> Result<()> {
    area.draw(&Text::new("vhost-user-blk servers compared", (24, 16), font(22, INK)))?;
    let mut x = 26;
    for (index, name) in findings.contenders().into_iter().enumerate() {
        area.draw(&Circle::new((x, 58), 6, colour(index).filled()))?;
        area.draw(&Text::new(name.to_owned(), (x + 12, 50), font(16, INK)))?;
        x += 44 + 9 * i32::try_from(name.chars().count())?;
    }
    let trips = findings.cells.iter().flat_map(|m| &m.alternations).map(|a| a.round_trip_ns);
    let trip = Spread::of(trips).map_or(0.0, |spread| spread.median);
    let note =
        format!("medians; bars: least to greatest; one cache-line round trip is {trip:.0} ns");
    let right = font(14, PALE).pos(Pos::new(HPos::Right, VPos::Top));
    area.draw(&Text::new(note, (i32::try_from(WIDTH)? - 24, 51), right))?;
    Ok(())
}

/// The range of `values` with a margin, for a logarithmic axis.
fn around(values: impl Iterator<Item = Spread>) -> Range<f64> {
    let (low, high) =
        values.fold((f64::MAX, f64::MIN), |(low, high), s| (low.min(s.min), high.max(s.max)));
    if low > high { 0.5..2.0 } else { low * 0.7..high * 1.4 }
}

/// A logarithmic axis with lines at 1, 2 and 5 times each power of ten.
fn logarithmic(
    range: Range<f64>,
) -> impl AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>> {
    let lines = ticks(&range);
    range.log_scale().with_key_points(lines)
}

#[expect(clippy::cast_possible_truncation, reason = "logarithms of f64 are below 400")]
fn ticks(range: &Range<f64>) -> Vec<f64> {
    let powers = range.start.log10().floor() as i32..=range.end.log10().ceil() as i32;
    let of_power = |power| [1.0, 2.0, 5.0].map(|digit| digit * 10_f64.powi(power));
    powers.flat_map(of_power).filter(|tick| range.contains(tick)).collect()
}

/// Draws a figure over depth, with a line for each server.
fn panel(
    area: &Area<'_>,
    findings: &Findings,
    cells: &[&Measured],
    title: &str,
    show: fn(f64) -> String,
    figure: fn(&Figures) -> f64,
) -> Result<()> {
    let spread = |cell: &Measured, server: usize| cell.of(server, figure);
    let servers = 0..findings.contenders().len();
    let all = cells.iter().flat_map(|cell| servers.clone().filter_map(|s| spread(cell, s)));
    let Cell { disk, rw, bs, queues, .. } = cells[0].cell;
    let queues_word = if queues == 1 { "queue" } else { "queues" };
    let caption =
        format!("{} disk, {} {bs}, {queues} {queues_word}: {title}", disk.name(), rw.name());
    let mut chart = ChartBuilder::on(area)
        .caption(caption, font(16, INK))
        .margin(14)
        .margin_right(24)
        .x_label_area_size(40)
        .y_label_area_size(72)
        .build_cartesian_2d(-1..i32::try_from(cells.len())?, logarithmic(around(all)))?;
    let depth = |x: &i32| {
        let cell = usize::try_from(*x).ok().and_then(|x| cells.get(x));
        cell.map_or_else(String::new, |cell| cell.cell.depth.to_string())
    };
    mesh(&mut chart, "depth", cells.len() + 2, &depth, &|y: &f64| show(*y))?;
    for server in servers {
        let points: Vec<(i32, Spread)> =
            (0..).zip(cells).filter_map(|(x, cell)| Some((x, spread(cell, server)?))).collect();
        let style = colour(server).stroke_width(2);
        chart.draw_series(LineSeries::new(points.iter().map(|(x, s)| (*x, s.median)), style))?;
        let bars = points.iter().map(|(x, s)| PathElement::new([(*x, s.min), (*x, s.max)], style));
        chart.draw_series(bars)?;
        let dots = points.iter().map(|(x, s)| Circle::new((*x, s.median), 4, style.filled()));
        chart.draw_series(dots)?;
    }
    Ok(())
}

/// Draws the grid and the labels of a panel.
fn mesh<Y>(
    chart: &mut ChartContext<'_, SVGBackend<'_>, Cartesian2d<RangedCoordi32, Y>>,
    x_desc: &str,
    x_labels: usize,
    x_format: &dyn Fn(&i32) -> String,
    y_format: &dyn Fn(&Y::ValueType) -> String,
) -> Result<()>
where
    Y: Ranged + ValueFormatter<Y::ValueType>,
{
    chart
        .configure_mesh()
        .x_desc(x_desc)
        .x_labels(x_labels)
        .y_labels(9)
        .x_label_formatter(x_format)
        .y_label_formatter(y_format)
        .label_style(font(13, PALE))
        .axis_desc_style(font(13, PALE))
        .axis_style(GRID)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .disable_x_mesh()
        .draw()?;
    Ok(())
}

/// Draws, for each cell, the first server's throughput divided by each other server's.
fn ratio_panel(area: &Area<'_>, findings: &Findings) -> Result<()> {
    let others = 1..findings.contenders().len();
    let ratio =
        |cell: &Measured, other: usize| cell.ratio(0, other, |figures: &Figures| figures.iops);
    let all = findings.cells.iter().flat_map(|c| others.clone().filter_map(|o| ratio(c, o)));
    let range = around(all);
    let range = range.start.min(0.7)..range.end.max(1.4);
    let caption =
        format!("IOPS of {} ÷ IOPS of the other, in one alternation", findings.servers[0].name);
    // The top of the panel is 0, and the first line -1.
    let lines = i32::try_from(findings.cells.len())?;
    let mut chart = ChartBuilder::on(area)
        .caption(caption, font(16, INK))
        .margin(14)
        .margin_right(24)
        .x_label_area_size(28)
        .y_label_area_size(190)
        .build_cartesian_2d(logarithmic(range), -lines - 1..0)?;
    let name = |y: &i32| {
        let cell = usize::try_from(-y - 1).ok().and_then(|line| findings.cells.get(line));
        cell.map_or_else(String::new, |cell| cell.cell.to_string())
    };
    chart
        .configure_mesh()
        .y_labels(findings.cells.len() + 2)
        .y_label_formatter(&name)
        .x_label_formatter(&|x: &f64| format!("× {}", digits(*x)))
        .label_style(font(13, PALE))
        .axis_style(GRID)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .draw()?;
    let one = [(1.0, -lines - 1), (1.0, 0)];
    chart.draw_series([PathElement::new(one, PALE.stroke_width(1))])?;
    for other in others {
        let style = colour(other).stroke_width(2);
        for (line, cell) in (1..).zip(&findings.cells) {
            let Some(Spread { median, min, max }) = ratio(cell, other) else { continue };
            chart.draw_series([PathElement::new([(min, -line), (max, -line)], style)])?;
            chart.draw_series([Circle::new((median, -line), 4, style.filled())])?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_at_round_numbers() {
        assert_eq!(ticks(&(70.0..1100.0)), [100.0, 200.0, 500.0, 1000.0]);
        assert_eq!(ticks(&(0.4..3.0)), [0.5, 1.0, 2.0]);
    }
}
