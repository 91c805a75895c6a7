//! Fewer points that look the same: the largest triangles of three buckets (Steinarsson, "Downsampling Time Series for Visual
//! Representation", 2013), for several lines over the same x at once.

/// Places of at most `most` (and at least 2) points that keep the shape of the lines `ys`, each as long as `xs`. A bucket in
/// which a line has no value keeps that place, so that gaps stay gaps.
pub(crate) fn places(xs: &[f64], ys: &[&[f64]], most: usize) -> Vec<usize> {
    let count = xs.len();
    let most = most.max(2);
    if count <= most {
        return (0..count).collect();
    }
    // Lines weigh the same, however high they are.
    let heights: Vec<f64> = ys.iter().map(|line| height(line)).collect();
    let buckets = most - 2;
    let start = |bucket: usize| 1 + bucket * (count - 2) / buckets.max(1);
    let mut kept = vec![0];
    for bucket in 0..buckets {
        let (from, to) = (start(bucket), start(bucket + 1));
        let next = to..start(bucket + 2).clamp(to + 1, count);
        let last = kept[kept.len() - 1];
        let gap = (from..to).find(|&place| ys.iter().any(|line| line[place].is_nan()));
        let area = |place: usize| -> f64 {
            let of_line = |(line, height): (&&[f64], &f64)| {
                let triangle = (xs[last] - mean(&xs[next.clone()])) * (line[place] - line[last])
                    - (xs[last] - xs[place]) * (mean(&line[next.clone()]) - line[last]);
                let area = triangle.abs() / height;
                if area.is_finite() { area } else { 0.0 }
            };
            ys.iter().zip(&heights).map(of_line).sum()
        };
        let largest = (from..to).map(|place| (area(place), place)).max_by(|a, b| a.0.total_cmp(&b.0));
        kept.extend(gap.or(largest.map(|(_, place)| place)));
    }
    kept.push(count - 1);
    kept
}

fn height(line: &[f64]) -> f64 {
    let finite = || line.iter().copied().filter(|value| value.is_finite());
    let height = finite().fold(f64::MIN, f64::max) - finite().fold(f64::MAX, f64::min);
    if height > 0.0 { height } else { 1.0 }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Places of at most `most` of `count` things, evenly from the first to the last: where all would be too many to show.
pub fn spread(count: usize, most: usize) -> impl Iterator<Item = usize> + Clone {
    let shown = count.min(most);
    (0..shown).map(move |i| if shown > 1 { i * (count - 1) / (shown - 1) } else { 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_points_stay_as_they_are() {
        assert_eq!(places(&[], &[&[]], 10), Vec::<usize>::new());
        assert_eq!(places(&[1.0, 2.0, 3.0], &[&[0.0; 3]], 3), [0, 1, 2]);
    }

    #[test]
    fn spikes_ends_and_gaps_are_kept() {
        let xs: Vec<f64> = (0..10_000).map(f64::from).collect();
        let mut flat = vec![1.0; 10_000];
        flat[3_210] = 50.0;
        let mut broken = flat.clone();
        broken[7_777] = f64::NAN;
        let kept = places(&xs, &[&flat, &broken], 300);
        assert_eq!(kept.len(), 300);
        assert!(kept.is_sorted_by(|a, b| a < b));
        for place in [0, 3_210, 7_777, 9_999] {
            assert!(kept.contains(&place), "{place}");
        }
        for most in [0, 2, 3, 4, 9_998, 9_999] {
            assert_eq!(places(&xs, &[&flat], most).len(), most.max(2));
        }
    }
}
