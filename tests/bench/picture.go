package main

import (
	"fmt"
	"os"
	"strings"
)

// chart is the ratios of one table: the first row is the reference, and not drawn.
type chart struct {
	title string
	rows  []row
}

type row struct {
	name   string
	ratios []float64 // in the order of columns
}

// The measures of a picture: pixels.
const (
	barWidth, groupGap = 11, 26
	left, top, height  = 48, 46, 220
	legend, chartGap   = 20, 60
)

// drawn are the columns of a table that the picture has: those where more is better.
var drawn = []struct {
	column int
	name   string
}{{0, "TCP, 1 stream"}, {1, "TCP, 4 streams"}, {2, "UDP packets"}, {3, "request/response"}, {5, "connections"}}

// colours are told apart by the colour-blind too (Okabe and Ito, 2008).
var colours = []string{"#999999", "#56b4e9", "#e69f00", "#d55e00", "#f0e442", "#cc79a7", "#009e73", "#0072b2", "#000000"}

// picture writes the charts as bars into an SVG file, each bar a ratio to the
// chart's reference, which is the line at 1.
func picture(file string, charts []chart) error {
	var out strings.Builder
	width, y := 0, 0
	colour := map[string]string{}
	for _, c := range charts {
		for _, r := range c.rows[1:] {
			if colour[r.name] == "" {
				colour[r.name] = colours[len(colour)%len(colours)]
			}
		}
		width = max(width, left+len(drawn)*((len(c.rows)-1)*barWidth+groupGap))
	}
	for _, c := range charts {
		drawChart(&out, c, y, width, colour)
		y += top + height + legend + chartGap
	}
	svg := fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">
<rect width="100%%" height="100%%" fill="white"/>
%s</svg>
`, width, y, out.String())
	return os.WriteFile(file, []byte(svg), 0o644)
}

func drawChart(out *strings.Builder, c chart, y, width int, colour map[string]string) {
	most := 1.2
	for _, r := range c.rows[1:] {
		for _, d := range drawn {
			most = max(most, r.ratios[d.column])
		}
	}
	at := func(ratio float64) float64 { return float64(y+top+height) - ratio/most*height }
	fmt.Fprintf(out, `<text x="%d" y="%d" font-size="14" font-weight="bold">%s</text>`+"\n", left, y+22, c.title)
	for tick := 0.0; tick <= most; tick += 0.2 {
		stroke := "#dddddd"
		if tick > 0.99 && tick < 1.01 {
			stroke = "#000000"
		}
		fmt.Fprintf(out, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="%s"/><text x="%d" y="%.1f" text-anchor="end">%.1f</text>`+"\n",
			left, width, at(tick), at(tick), stroke, left-6, at(tick)+4, tick)
	}
	for g, d := range drawn {
		bars, group := (len(c.rows)-1)*barWidth, (width-left)/len(drawn)
		x := left + g*group + (group-bars)/2
		for i, r := range c.rows[1:] {
			v := r.ratios[d.column]
			fmt.Fprintf(out, `<rect x="%d" y="%.1f" width="%d" height="%.1f" fill="%s"><title>%s, %s: %.2f</title></rect>`+"\n",
				x+i*barWidth, at(v), barWidth-1, at(0)-at(v), colour[r.name], r.name, d.name, v)
		}
		fmt.Fprintf(out, `<text x="%d" y="%d" text-anchor="middle">%s</text>`+"\n", x+bars/2, y+top+height+18, d.name)
	}
	x, line := left, y+top+height+legend+22
	for _, r := range c.rows[1:] {
		if wide := 24 + 7*len(r.name); x+wide > width {
			x, line = left, line+18
		}
		fmt.Fprintf(out, `<rect x="%d" y="%d" width="11" height="11" fill="%s"/><text x="%d" y="%d">%s</text>`+"\n", x, line-10, colour[r.name], x+15, line, r.name)
		x += 24 + 7*len(r.name)
	}
}
