package main

import (
	"context"
	"crypto/ed25519"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/ipam"
	"github.com/weftnet/weft/store"
)

const (
	dockerSocket = "weft.sock" // as in config.json
	adminSocket  = "weft-admin.sock"
	databaseFile = "weft.db"
	// retryAfter is the pause before what could not start is tried again.
	retryAfter = 5 * time.Second
)

// places are the folders of the process; config.json names them.
type places struct {
	run    string // of the sockets
	state  string // of database and host key
	sysnet string // where the host's /proc/sys/net can be written
	bpf    string // bpf file system, where maps outlive the process
}

// process is what the tasks share. The fields do not change.
type process struct {
	places  places
	set     settings
	gate    *gate
	metrics *metrics
	log     *slog.Logger
	journal *journal
	swarm   *discovery
	term    *term
	program *kernel.Program
	started time.Time
}

// run is the plugin: a process that only keeps a child (see keepChild), and that child.
// It returns when it was told to end, or when it cannot even listen; every other
// trouble is the answer to calls and the text of "weft status".
func run(ctx context.Context, args []string, errOut io.Writer) error {
	var p process
	flags := flag.NewFlagSet("plugin", flag.ContinueOnError)
	flags.SetOutput(errOut)
	flags.StringVar(&p.places.run, "run-dir", "/run/docker/plugins", "folder of the sockets")
	flags.StringVar(&p.places.state, "state-dir", "/var/lib/weft", "folder of database and host key")
	flags.StringVar(&p.places.bpf, "bpf", "/run/weft/bpf", "bpf file system, where the port program's maps outlive the process")
	flags.StringVar(&p.places.sysnet, "sysnet", "/run/weft/sysnet", "where the host's /proc/sys/net can be written")
	inherit := flags.Bool(inheritFlag, false, "the sockets are open already, as file descriptors 3 and 4, and the port program from 5 on")
	parent := flags.String(parentFlag, "", "a name of the process that started this one with -inherit")
	noProgram := flags.String(noProgramFlag, "", "why the port program is not loaded")
	if err := flags.Parse(args); err != nil {
		return err
	}
	var wrong error
	p.set, wrong = parseSettings(os.Getenv, os.ReadFile)
	// dockerd writes the time in front of each line.
	p.log = slog.New(slog.NewTextHandler(errOut, &slog.HandlerOptions{Level: p.set.level, ReplaceAttr: dropTime}))
	// First of all: Docker's own start waits for the socket.
	docker, admin, err := openSockets(p.places.run, *inherit)
	if err != nil {
		return err
	}
	if !*inherit {
		program := p.loadProgram()
		defer program.Close()
		if err := dropPrivileges(); err != nil { // the child's too
			p.log.Error("privileges were not dropped", "err", err)
		}
		return errors.Join(keepChild(args, docker, admin, program, p.log), docker.Close(), admin.Close())
	}
	if p.program = kernel.NoProgram(*noProgram, p.places.bpf); *noProgram == "" {
		p.program = kernel.InheritProgram(firstProgramFile, p.places.bpf)
	}
	useFailPoints(p.places.state)
	// Most of the heap is what the cluster has, which stays: collecting at half of the
	// usual garbage costs little processor and saves a quarter of the memory.
	debug.SetGCPercent(50)
	p.started, p.gate, p.swarm, p.term = time.Now(), newGate(), newDiscovery(), openTerm(filepath.Join(p.places.state, termFile), *parent, p.log)
	p.metrics = newMetrics(p.gate)
	p.journal = openJournal(filepath.Join(p.places.state, journalFolder), p.log)
	p.log.Info("weft listens", "version", buildVersion(), "pid", os.Getpid())

	// The workers outlive the servers: calls in flight need them to finish.
	work, stopWork := context.WithCancel(context.WithoutCancel(ctx))
	workers, work := errgroup.WithContext(work)
	workers.Go(func() error { return p.work(work, wrong) })

	servers, ctx := errgroup.WithContext(ctx)
	servers.Go(func() error { return p.awaitSignal(ctx) })
	calls := &server{gate: p.gate, metrics: p.metrics, log: p.log, limit: callLimit, journal: p.journal}
	servers.Go(func() error { return serveHTTP(ctx, docker, calls.handler(p.routes()), p.log) })
	servers.Go(func() error { return serveHTTP(ctx, admin, p.adminHandler(), p.log) })
	servers.Go(func() error { return p.serveMetrics(ctx) })
	servers.Go(func() error { return p.watchServices(ctx) })
	err = servers.Wait()
	stopWork()
	err = errors.Join(err, workers.Wait())
	if errors.Is(err, errStopped) {
		p.log.Info("weft ends; networks and traffic stay")
		return nil
	}
	return err
}

func dropTime(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && a.Key == slog.TimeKey {
		return slog.Attr{}
	}
	return a
}

// switchedOff is why the port program is off when it is meant to be.
const switchedOff = "switched off by WEFT_PROGRAM=off"

// loadProgram loads the port program, for the child too: that takes privileges which
// nothing else does.
func (p *process) loadProgram() *kernel.Program {
	if p.set.program == "off" {
		return kernel.NoProgram(switchedOff, p.places.bpf)
	}
	program := kernel.LoadProgram(p.places.bpf)
	if err := program.Err(); err != nil {
		p.log.Warn("networks do without the port program", "err", err)
	}
	return program
}

// errStopped ends the servers when the process was told to end.
var errStopped = errors.New("told to end")

func (p *process) awaitSignal(ctx context.Context) error {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(c)
	select {
	case <-ctx.Done():
		return nil
	case <-c:
		return errStopped
	}
}

// serveMetrics serves metrics on TCP if that was asked for. A port that is taken
// is tried again.
func (p *process) serveMetrics(ctx context.Context) error {
	if p.set.metrics == "" {
		return nil
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", p.metrics.handler())
	return p.keep(ctx, "metrics on TCP", func() error {
		l, err := net.Listen("tcp", p.set.metrics)
		if err != nil {
			return err
		}
		return serveHTTP(ctx, l, mux, p.log)
	}, func(error) {})
}

// keep runs fn until ctx ends, again after retryAfter when it fails. It logs a
// failure once, as long as it stays the same, and tells it to failed.
func (p *process) keep(ctx context.Context, what string, fn func() error, failed func(error)) error {
	last := ""
	for {
		err := fn()
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			err = errors.New("ended by itself")
		}
		failed(err)
		if err.Error() != last {
			last = err.Error()
			p.log.Error("does not work; trying again", "what", what, "every", retryAfter, "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retryAfter):
		}
	}
}

// work keeps the services up. With wrong settings there are none.
func (p *process) work(ctx context.Context, wrong error) error {
	if wrong != nil {
		p.log.Error("settings are wrong; every call is answered with that", "err", wrong)
		p.gate.fail(wrong)
		<-ctx.Done()
		return nil
	}
	return p.keep(ctx, "database and kernel", func() error { return p.serveRecords(ctx) }, p.gate.fail)
}

// serveRecords opens the database and runs the tasks on it until ctx ends or one
// of them fails.
func (p *process) serveRecords(ctx context.Context) error {
	p.gate.at("opening the database " + filepath.Join(p.places.state, databaseFile))
	identity, keys, err := loadKeys(p.places.state, p.set.tunnelPort)
	if err != nil {
		return err
	}
	tunnel, err := keys.tunnel()
	if err != nil {
		return err
	}
	db, err := store.Open(filepath.Join(p.places.state, databaseFile), store.Host{
		ID: identity.ID, Name: hostName(), PublicKey: identity.Key.Public().(ed25519.PublicKey),
		Address: p.set.address, DataPort: p.set.dataPort, Version: buildVersion(), Scope: p.set.scope,
		Public: p.set.public, Tunnel: tunnel,
	})
	if err != nil {
		return err
	}
	defer func() { _ = db.Close() }()
	p.gate.at("looking for another host with this one's identity")
	if err := p.original(ctx, db, identity); err != nil {
		return err
	}
	p.gate.at("reading the kernel")
	k, err := kernel.New(kernel.Config{Backend: p.set.iptables, Checksum: p.set.checksum, SysNet: p.sysnet(),
		WireGuard: p.set.wireguard, WireGuardKey: keys.private, Program: p.program, Flows: p.set.flows == "on", Log: p.log})
	if err != nil {
		return fmt.Errorf("kernel: %w", err)
	}
	defer k.Close()
	rebuilt, err := rebuild(ctx, p.places.state, db, k)
	if err != nil {
		return err
	}
	if rebuilt != "" {
		p.log.Error("database was lost", "rebuilt", rebuilt)
	}
	var loop *dataplane.Loop
	c := newCluster(p, db, identity, func(a netip.Addr) bool { return loop.Underlay().Prefix.Contains(a) },
		func(ctx context.Context) error { return loop.Settled(ctx) })
	loop = dataplane.NewLoop(db, k, p.underlayAddress(db), c.inSync, p.log)
	svc := &services{db: db, kernel: k, loop: loop, cluster: c, rebuilt: rebuilt, log: p.log,
		rotator: &rotator{keys: keys, db: db, tunnels: k.Tunnels, loop: loop, settled: loop.Settled, taken: c.taken, ask: make(chan struct{}, 1), log: p.log},
		driver:  driver.New(driver.Config{DB: db, Refuse: c.copied, Fits: func(n store.Network) error { return dataplane.Fits(n, loop.Underlay()) }, Keyed: len(p.set.key) > 0, Term: p.term.now.Load, Doubt: p.term.doubt.Load, Sync: loop, Routes: driverRoutes(k), VXLANs: driverVXLANs(k), Hold: holdPort, Log: p.log}),
	}
	svc.ipam = ipam.New(db, ipam.Config{Defaults: p.set.subnets, Term: p.term.now.Load, Repeats: svc.driver.Repeats, Routes: ipamRoutes(k), Swarm: p.set.scope == scopeGlobal, AuditEvery: auditEvery, Now: auditClock(p.places.state), Log: p.log})
	// Before the gate opens: nothing of what follows may come in between.
	p.journal.finish(ctx, svc)
	if err := svc.driver.HoldPorts(); err != nil {
		return err
	}
	tasks, ctx := errgroup.WithContext(ctx)
	tasks.Go(func() error { return loop.Run(ctx) })
	tasks.Go(func() error { return c.run(ctx, loop.Ready()) })
	tasks.Go(func() error { return p.swarm.run(ctx, db, c, p.log) })
	tasks.Go(func() error { return driver.NewAudit(svc.driver, auditEvery, auditClock(p.places.state)).Run(ctx) })
	tasks.Go(func() error { return svc.ipam.Run(ctx) })
	tasks.Go(func() error { return svc.rotator.run(ctx, p.set.keyAge) })
	tasks.Go(func() error { return reportReady(ctx, loop, p.log) })
	p.gate.open(svc)
	err = tasks.Wait()
	p.gate.fail(errors.New("weft is ending"))
	return err
}

// reportReady logs when the kernel was compared for the first time.
func reportReady(ctx context.Context, loop *dataplane.Loop, log *slog.Logger) error {
	select {
	case <-ctx.Done():
	case <-loop.Ready():
		log.Info("kernel matches the records", "networks", max(len(loop.Status())-1, 0))
	}
	return nil
}

// sysnet returns where the host's network sysctls can be written, "" for the
// usual path.
func (p *process) sysnet() string {
	if _, err := os.Stat(p.places.sysnet); err != nil {
		return ""
	}
	return p.places.sysnet
}

func driverRoutes(k *kernel.Kernel) func(context.Context) ([]driver.Route, error) {
	return func(ctx context.Context) ([]driver.Route, error) {
		routes, err := k.Routes(ctx)
		out := make([]driver.Route, 0, len(routes))
		for _, r := range routes {
			out = append(out, driver.Route{Prefix: r.Prefix, Link: r.Link})
		}
		return out, err
	}
}

func driverVXLANs(k *kernel.Kernel) func(context.Context) ([]driver.VXLAN, error) {
	return func(ctx context.Context) ([]driver.VXLAN, error) {
		links, err := k.VXLANs(ctx)
		out := make([]driver.VXLAN, 0, len(links))
		for _, l := range links {
			out = append(out, driver.VXLAN{Name: l.Name, VNI: l.VNI, Port: l.Port})
		}
		return out, err
	}
}

func ipamRoutes(k *kernel.Kernel) func(context.Context) ([]netip.Prefix, error) {
	return func(ctx context.Context) ([]netip.Prefix, error) {
		routes, err := k.Routes(ctx)
		out := make([]netip.Prefix, 0, len(routes))
		for _, r := range routes {
			out = append(out, r.Prefix)
		}
		return out, err
	}
}
