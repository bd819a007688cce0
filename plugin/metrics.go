package main

import (
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics counts calls; what the services know themselves is read when Prometheus
// asks (stateCollector).
type metrics struct {
	registry *prometheus.Registry
	calls    *prometheus.HistogramVec
	inFlight prometheus.Gauge
}

func newMetrics(g *gate) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		calls: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "weft_call_duration_seconds",
			Help: "Calls of Docker by method and result (ok, error, rejected: a bad request).",
			// 0.5 ms to 10 s, the limit of a call.
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		}, []string{"method", "result"}),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{Name: "weft_calls_in_flight", Help: "Calls of Docker being served."}),
	}
	build := prometheus.NewGauge(prometheus.GaugeOpts{Name: "weft_build_info", Help: "Always 1; the label tells the version.",
		ConstLabels: prometheus.Labels{"version": buildVersion()}})
	build.Set(1)
	m.registry.MustRegister(m.calls, m.inFlight, build, newStateCollector(g),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// observe counts a finished call.
func (m *metrics) observe(method string, err error, took time.Duration) {
	result := "ok"
	var bad *requestError
	switch {
	case errors.As(err, &bad):
		result = "rejected"
	case err != nil:
		result = "error"
	}
	m.calls.WithLabelValues(method, result).Observe(took.Seconds())
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}

// stateCollector reads the services at each scrape, so that no counter can lag
// behind what it counts.
type stateCollector struct {
	gate *gate

	up, passes, ops, failures, repaired, failing, objects *prometheus.Desc
	networks, endpoints, remote, peers, pools, leases     *prometheus.Desc
	fetches, fetchErrors, drops                           *prometheus.Desc
	guarded, packets                                      *prometheus.Desc
	flows, flowPackets, flowBytes                         *prometheus.Desc
}

func newStateCollector(g *gate) *stateCollector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("weft_"+name, help, labels, nil)
	}
	return &stateCollector{
		gate:        g,
		up:          desc("up", "1 when calls are served, 0 while starting or when the database or kernel cannot be used."),
		passes:      desc("passes_total", "Passes of the loop over a network or the host."),
		ops:         desc("ops_total", "Changes made to the kernel."),
		failures:    desc("pass_failures_total", "Passes after which the kernel did not match the records."),
		repaired:    desc("repaired_total", "Objects that something else had changed and a pass put right, by kind.", "kind"),
		failing:     desc("networks_failing", "Networks whose last pass failed."),
		objects:     desc("objects", "Kernel objects that the records ask for."),
		networks:    desc("networks", "Networks of this host."),
		endpoints:   desc("endpoints", "Endpoints of this host."),
		remote:      desc("remote_endpoints", "Endpoints of peers in networks of this host."),
		peers:       desc("peers", "Other hosts by state (alive, dead, hidden).", "state"),
		pools:       desc("pools", "Address pools."),
		fetches:     desc("fetches_total", "Questions for records to their owners."),
		fetchErrors: desc("fetch_errors_total", "Questions for records that failed."),
		drops:       desc("drops_total", "Messages, records and streams of other hosts that were refused, by reason.", "reason"),
		guarded:     desc("guard_drops_total", "Frames of containers that the guard dropped, by reason.", "reason"),
		packets:     desc("program_packets_total", "Frames of containers that the port program took to their destination (fast) or left to the host's stack (slow).", "path"),
		flows:       desc("flows", "Flows that weft flows lists, of at most 65536."),
		flowPackets: desc("flow_packets_total", "IP packets of containers by what became of them: fast, slow, or dropped for a reason.", "verdict", "reason"),
		flowBytes:   desc("flow_bytes_total", "Bytes of those packets.", "verdict", "reason"),
		leases:      desc("leases", "Addresses by state (taken, cooling).", "state"),
	}
}

// Describe implements prometheus.Collector.
func (c *stateCollector) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(c, ch) }

// Collect implements prometheus.Collector.
func (c *stateCollector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v int, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v), labels...)
	}
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	svc, _, _ := c.gate.peek()
	if svc == nil {
		gauge(c.up, 0)
		return
	}
	gauge(c.up, 1)
	stats := svc.loop.Stats()
	counter(c.passes, stats.Passes)
	counter(c.ops, stats.Ops)
	counter(c.failures, stats.Failures)
	for kind, n := range stats.Repaired {
		counter(c.repaired, n, strings.ToLower(kind))
	}
	failing, objects := 0, 0
	for _, n := range svc.loop.Status() {
		objects += n.Objects
		if n.Err != "" {
			failing++
		}
	}
	gauge(c.failing, failing)
	gauge(c.objects, objects)
	members := svc.cluster.stats()
	counter(c.fetches, members.Fetches)
	counter(c.fetchErrors, members.FetchErrors)
	for reason, n := range members.Dropped {
		counter(c.drops, n, reason)
	}
	if sum, err := svc.kernel.Counters(); err == nil {
		for reason, n := range sum.Dropped {
			counter(c.guarded, n, reason)
		}
		counter(c.packets, sum.Fast, "fast")
		counter(c.packets, sum.Slow, "slow")
	}
	if known, sums, err := svc.kernel.FlowTotals(); err == nil {
		gauge(c.flows, known)
		for v, sum := range sums {
			verdict, reason, _ := strings.Cut(string(v), ": ")
			counter(c.flowPackets, sum.Packets, verdict, reason)
			counter(c.flowBytes, sum.Bytes, verdict, reason)
		}
	}
	counts, err := countRecords(svc.db)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(c.networks, err)
		return
	}
	gauge(c.networks, counts.Networks)
	gauge(c.endpoints, counts.Endpoints)
	gauge(c.remote, counts.Remote)
	gauge(c.peers, counts.PeersAlive, "alive")
	gauge(c.peers, counts.PeersDead, "dead")
	gauge(c.peers, counts.PeersHidden, "hidden")
	gauge(c.pools, counts.Pools)
	gauge(c.leases, counts.Leases, "taken")
	gauge(c.leases, counts.Cooling, "cooling")
}
