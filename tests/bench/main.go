// Command bench measures Weft against Docker's own networks, side by side in one
// run, and prints ratios. Nothing is asserted: docs/benchmarks.md keeps the table.
//
// Two hosts run every path: a raw veth pair, Docker's bridge, Docker's overlay (a
// two-host Swarm), Weft, and for encrypted networks a bare WireGuard device. A round
// measures each path once; odd rounds go through them in reverse. Figures are
// medians over the rounds, ratios medians of the rounds' ratios.
package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/safchain/ethtool"

	"github.com/weftnet/weft/tests/hosts"
)

// options are the command's flags.
type options struct {
	rounds, attaches, mtu, endpoints int
	length                           time.Duration
	wire                             bool
	set, svg, only, crowd            string
}

func main() {
	var o options
	flag.IntVar(&o.rounds, "rounds", 5, "rounds over all paths")
	flag.DurationVar(&o.length, "length", 600*time.Millisecond, "length of each flow in a round")
	flag.IntVar(&o.attaches, "attaches", 9, "docker run --rm per network; 0 leaves that table out")
	flag.IntVar(&o.mtu, "mtu", 1500, "MTU of the hosts' network")
	flag.BoolVar(&o.wire, "wire", false, "no segmentation offload on the hosts' network: every packet is as large as its MTU")
	flag.StringVar(&o.set, "set", "", "a further setting of the plugin, for example WEFT_FLOWS=off")
	flag.StringVar(&o.only, "only", "", "a word of the titles of the tables to measure")
	flag.IntVar(&o.endpoints, "endpoints", 0, "endpoints of a third host in each network of Weft, beside those measured")
	flag.StringVar(&o.crowd, "crowd", "", "file that says what third host to be; for this command's own use")
	flag.StringVar(&o.svg, "svg", "", "file for a picture of the ratios")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	run := func() error { return bench(ctx, o) }
	if o.crowd != "" {
		run = func() error { return play(ctx, o.crowd) }
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1)
	}
}

func bench(ctx context.Context, o options) (err error) {
	dir, err := os.MkdirTemp("", "weft-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if out, err := exec.CommandContext(ctx, "make", "-s", "plugin", "PLUGIN="+dir).CombinedOutput(); err != nil {
		return fmt.Errorf("make plugin: %w: %s", err, out)
	}
	names := []hosts.HostOptions{{Name: "alpha"}, {Name: "beta"}}
	if o.endpoints > 0 {
		names = append(names, hosts.HostOptions{Name: "gamma"})
	}
	lab, err := hosts.New(ctx, hosts.Options{MTU: o.mtu, Hosts: names})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lab.Close()) }()
	b := &setup{ctx: ctx, plugin: dir, a: lab.Hosts[0], b: lab.Hosts[1]}
	if o.wire {
		if err := b.noOffload(); err != nil {
			return err
		}
	}
	if err := b.networks(o.set); err != nil {
		return err
	}
	defer b.end()
	same, across, encrypted, err := b.paths()
	if err != nil {
		return err
	}
	if o.endpoints > 0 {
		if err := b.fill(lab.Hosts[2], o.endpoints); err != nil {
			return err
		}
	}
	var charts []chart
	for _, t := range []struct {
		title string
		paths []path
	}{{"Same host, ratio to a raw veth pair", same}, {"Across hosts, ratio to the hosts' own network", across},
		{"Across hosts, encrypted, ratio to a bare device of wireguard-go", encrypted}} {
		if !strings.Contains(t.title, o.only) {
			continue
		}
		rows, err := table(t.title, t.paths, o.rounds, o.length)
		if err != nil {
			return err
		}
		charts = append(charts, chart{t.title, rows})
	}
	if o.svg != "" {
		if err := picture(o.svg, charts); err != nil {
			return err
		}
	}
	if o.attaches > 0 {
		return b.attach(o.attaches)
	}
	return nil
}

// setup is the two hosts with all networks.
type setup struct {
	ctx    context.Context
	plugin string // folder
	key    string // of the cluster, hex
	a, b   *hosts.Host

	started []*exec.Cmd // that end with the bench
}

func (s *setup) networks(set string) error {
	join := "WEFT_JOIN=" + s.a.Address.String() + "," + s.b.Address.String()
	key := make([]byte, 32)
	_, _ = rand.Read(key) // never fails
	s.key = hex.EncodeToString(key)
	settings := []string{join, "WEFT_KEY=" + s.key}
	if set != "" {
		settings = append(settings, set)
	}
	for i, h := range []*hosts.Host{s.a, s.b} {
		if err := h.InstallPlugin(s.ctx, s.plugin, settings...); err != nil {
			return err
		}
		if _, err := h.Docker(s.ctx, "network", "create", "-d", hosts.PluginName, "--subnet", "10.32.0.0/16",
			"--ip-range", fmt.Sprintf("10.32.%d.0/24", i+1), "weft"); err != nil {
			return err
		}
		if _, err := h.Docker(s.ctx, "network", "create", "-d", hosts.PluginName, "-o", "mode=routed", "--subnet", "10.35.0.0/16", "--gateway", "10.35.0.1",
			"--ip-range", fmt.Sprintf("10.35.%d.0/24", i+1), "routed"); err != nil {
			return err
		}
		if _, err := h.Docker(s.ctx, "network", "create", "-d", hosts.PluginName, "-o", "fastpath=false", "--subnet", "10.37.0.0/16",
			"--ip-range", fmt.Sprintf("10.37.%d.0/24", i+1), "weftslow"); err != nil {
			return err
		}
		if _, err := h.Docker(s.ctx, "network", "create", "-d", hosts.PluginName, "-o", "mode=routed", "-o", "fastpath=false", "--subnet", "10.38.0.0/16", "--gateway", "10.38.0.1",
			"--ip-range", fmt.Sprintf("10.38.%d.0/24", i+1), "routedslow"); err != nil {
			return err
		}
		if _, err := h.Docker(s.ctx, "network", "create", "-d", hosts.PluginName, "-o", "encrypted", "--subnet", "10.36.0.0/16", "--gateway", "10.36.0.1",
			"--ip-range", fmt.Sprintf("10.36.%d.0/24", i+1), "crypt"); err != nil {
			return err
		}
		if _, err := h.Docker(s.ctx, "network", "create", "br"); err != nil {
			return err
		}
	}
	if _, err := s.a.Docker(s.ctx, "swarm", "init", "--advertise-addr", s.a.Address.String()); err != nil {
		return err
	}
	token, err := s.a.Docker(s.ctx, "swarm", "join-token", "-q", "worker")
	if err != nil {
		return err
	}
	if _, err := s.b.Docker(s.ctx, "swarm", "join", "--token", token, s.a.Address.String()+":2377"); err != nil {
		return err
	}
	_, err = s.a.Docker(s.ctx, "network", "create", "-d", "overlay", "--attachable", "--subnet", "10.33.0.0/16", "ov")
	return err
}

// noOffload makes the hosts' links carry single packets, as a wire does.
func (s *setup) noOffload() error {
	for _, h := range []*hosts.Host{s.a, s.b} {
		err := inside(h.NetNS(), func() error {
			tool, err := ethtool.NewEthtool()
			if err != nil {
				return err
			}
			defer tool.Close()
			return tool.Change("eth0", map[string]bool{"tx-tcp-segmentation": false, "tx-tcp6-segmentation": false, "tx-udp-segmentation": false,
				"tx-udp_tnl-segmentation": false, "tx-udp_tnl-csum-segmentation": false, "tx-generic-segmentation": false})
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// paths starts two containers of each network on the first host and one on the
// second, and returns what to measure between.
func (s *setup) paths() (same, across, encrypted []path, err error) {
	for _, raw := range [][4]string{{"raw veth", "none", "raw", "10.34.0"}, {"raw veth, its containers on a network", "br", "tracked", "10.39.0"}} {
		p, err := s.veth(raw[0], raw[1], raw[2], raw[3])
		if err != nil {
			return nil, nil, nil, err
		}
		same = append(same, p)
	}
	shortest, err := s.redirect("two pairs and a bare redirect, on a network", "br", "cut", "10.41.0")
	if err != nil {
		return nil, nil, nil, err
	}
	same = append(same, shortest)
	bare, err := s.bare()
	if err != nil {
		return nil, nil, nil, err
	}
	encrypted = append(encrypted, bare)
	across = append(across, path{"host", s.a.NetNS(), s.b.NetNS(), s.b.Address})
	for _, n := range []struct{ name, network string }{{"docker bridge", "br"}, {"docker overlay", "ov"}, {"weft", "weft"}, {"weft routed", "routed"}, {"weft, slow path", "weftslow"}, {"weft routed, slow path", "routedslow"}, {"weft encrypted", "crypt"}} {
		one, _, err := s.container(s.a, n.network+"1", n.network)
		if err != nil {
			return nil, nil, nil, err
		}
		two, address, err := s.container(s.a, n.network+"2", n.network)
		if err != nil {
			return nil, nil, nil, err
		}
		same = append(same, path{n.name, one, two, address})
		if n.network == "br" {
			continue
		}
		three, address, err := s.container(s.b, n.network+"3", n.network)
		if err != nil {
			return nil, nil, nil, err
		}
		// The record of the other end may be on its way.
		p := path{n.name, one, three, address}
		if err := reach(s.ctx, s.a, n.network+"1", address); err != nil {
			return nil, nil, nil, err
		}
		if n.network == "crypt" {
			encrypted = append(encrypted, p)
		} else {
			across = append(across, p)
		}
	}
	return same, across, encrypted, nil
}

func (s *setup) container(h *hosts.Host, name, network string) (ns string, a netip.Addr, err error) {
	c, err := h.Run(s.ctx, name, "--network", network)
	if err != nil {
		return "", a, err
	}
	pid, err := c.PID(s.ctx)
	if err != nil {
		return "", a, err
	}
	a, err = c.Address(s.ctx, network)
	return fmt.Sprintf("/proc/%d/ns/net", pid), a, err
}

// veth puts a pair between two containers on Docker's network, with addresses of the
// subnet, of which the last byte is left out.
func (s *setup) veth(name, network, link, subnet string) (path, error) {
	pids, err := s.two(link, network)
	if err != nil {
		return path{}, err
	}
	script := fmt.Sprintf("ip link add %[1]s netns %[2]d type veth peer name %[1]s netns %[3]d", link, pids[0], pids[1])
	for i, pid := range pids {
		script += fmt.Sprintf("; nsenter -t %[1]d -n ip addr add %[2]s.%[3]d/24 dev %[4]s; nsenter -t %[1]d -n ip link set %[4]s up", pid, subnet, i+1, link)
	}
	if _, err := s.a.Exec(s.ctx, "sh", "-ec", script); err != nil {
		return path{}, err
	}
	return path{name, fmt.Sprintf("/proc/%d/ns/net", pids[0]), fmt.Sprintf("/proc/%d/ns/net", pids[1]), netip.MustParseAddr(subnet + ".2")}, nil
}

// two starts two containers on the first host and returns their processes.
func (s *setup) two(name, network string) (pids [2]int, err error) {
	for i := range pids {
		c, err := s.a.Run(s.ctx, fmt.Sprint(name, i+1), "--network", network)
		if err != nil {
			return pids, err
		}
		if pids[i], err = c.PID(s.ctx); err != nil {
			return pids, err
		}
	}
	return pids, nil
}

func reach(ctx context.Context, h *hosts.Host, container string, a netip.Addr) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		_, err := h.Docker(ctx, "exec", container, "ping", "-c", "1", "-W", "1", a.String())
		if err == nil || ctx.Err() != nil {
			return err
		}
	}
}

// table measures and prints one set of paths; the first is the reference. It returns
// the ratios.
func table(title string, paths []path, rounds int, length time.Duration) (rows []row, err error) {
	all := make([][]figures, len(paths))
	for r := range rounds {
		order := make([]int, len(paths))
		for i := range order {
			order[i] = i
			if r%2 == 1 {
				order[i] = len(paths) - 1 - i
			}
		}
		for _, i := range order {
			f, err := paths[i].measure(length)
			if err != nil {
				return nil, err
			}
			all[i] = append(all[i], f)
		}
	}
	fmt.Printf("\n### %s\n\n| path | TCP 1 Gbit/s | TCP 4 Gbit/s | UDP kpps | request/response per s | p99 | connections per s | CPU s per GB |\n|---|---|---|---|---|---|---|---|\n", title)
	cells := []struct {
		format string
		value  func(figures) float64
	}{
		{"%.1f", func(f figures) float64 { return f.tcp1 / 1e9 }},
		{"%.1f", func(f figures) float64 { return f.tcp4 / 1e9 }},
		{"%.0f", func(f figures) float64 { return f.udp / 1e3 }},
		{"%.0f", func(f figures) float64 { return f.rr }},
		{"%.0f µs", func(f figures) float64 { return float64(f.rrP99.Microseconds()) }},
		{"%.0f", func(f figures) float64 { return f.crr }},
		{"%.2f", func(f figures) float64 { return f.cpuPerGB }},
	}
	for i, p := range paths {
		fmt.Printf("| %s |", p.name)
		line := row{name: p.name}
		for _, c := range cells {
			var values, ratios []float64
			for r := range all[i] {
				values = append(values, c.value(all[i][r]))
				ratios = append(ratios, c.value(all[i][r])/c.value(all[0][r]))
			}
			fmt.Printf(" "+c.format+" (%.2f) |", median(values), median(ratios))
			line.ratios = append(line.ratios, median(ratios))
		}
		fmt.Println()
		rows = append(rows, line)
	}
	return rows, nil
}

// attach times docker run --rm with each network, interleaved.
func (s *setup) attach(times int) error {
	networks := []string{"none", "br", "ov", "weft", "routed", "crypt"}
	took := map[string][]float64{}
	for range times {
		for _, n := range networks {
			start := time.Now()
			if _, err := s.a.Docker(s.ctx, "run", "--rm", "--network", n, hosts.Image, "true"); err != nil {
				return err
			}
			took[n] = append(took[n], time.Since(start).Seconds()*1e3)
		}
	}
	fmt.Printf("\n### docker run --rm, median of %d\n\n| network | ms | ratio to Docker's bridge |\n|---|---|---|\n", times)
	for _, n := range networks {
		var ratios []float64
		for i := range took[n] {
			ratios = append(ratios, took[n][i]/took["br"][i])
		}
		fmt.Printf("| %s | %.0f | %.2f |\n", strings.NewReplacer("br", "docker bridge", "ov", "docker overlay", "routed", "weft routed", "crypt", "weft encrypted").Replace(n), median(took[n]), median(ratios))
	}
	return nil
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	return s[len(s)/2]
}
