package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/store"
)

const (
	// settle is how long events are collected before they are sent.
	settle = 100 * time.Millisecond
	// pollEvery is how often the rules of the legacy backend, which tells no
	// changes, are compared.
	pollEvery = time.Second
	// eventBuffer holds the events of some 10,000 entries.
	eventBuffer = 8 << 20
)

// Watch implements dataplane.Kernel. What the kernel tells of nobody (sets, rules
// of the legacy backend, settings of a bridge's stack other than rp_filter) is
// found by polling or by the next full read.
func (k *Kernel) Watch(ctx context.Context) <-chan store.VNI {
	w := &watch{k: k, links: map[int32]seen{}, events: make(chan []store.VNI), done: ctx.Done()}
	out := make(chan store.VNI)
	w.listen(ctx, unix.NETLINK_ROUTE, w.routeEvent, unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_IFADDR,
		unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_NETCONF, unix.RTNLGRP_IPV6_NETCONF,
		unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE, unix.RTNLGRP_TC)
	w.listen(ctx, unix.NETLINK_NETFILTER, ruleEvent, unix.NFNLGRP_NFTABLES)
	go w.pollLegacy(ctx)
	go w.pollProgram(ctx)
	go w.pollTunnels(ctx)
	go w.collect(ctx, out)
	return out
}

// watch is one running Watch. links belongs to the goroutine that reads
// rtnetlink.
type watch struct {
	k      *Kernel
	links  map[int32]seen
	events chan []store.VNI
	done   <-chan struct{}
}

// seen is what the last event told of a link.
type seen struct {
	vni  store.VNI // 0: not ours
	link link
}

func (w *watch) send(v ...store.VNI) {
	if len(v) == 0 {
		return
	}
	select {
	case w.events <- v:
	case <-w.done:
	}
}

// all sends everything: after events were lost.
func (w *watch) all(ctx context.Context) {
	networks, err := w.k.Networks(ctx)
	if err != nil && ctx.Err() == nil {
		w.k.log.Warn("cannot list networks after lost events; the next audit reads them", "err", err)
	}
	w.send(append(networks, store.HostVNI)...)
}

// collect sends what came in, each network once, when it was quiet for a while.
func (w *watch) collect(ctx context.Context, out chan<- store.VNI) {
	defer close(out)
	pending := map[store.VNI]bool{}
	var quiet <-chan time.Time
	var ready []store.VNI
	for {
		var to chan<- store.VNI
		var next store.VNI
		if len(ready) > 0 {
			to, next = out, ready[0]
		}
		select {
		case <-ctx.Done():
			return
		case vs := <-w.events:
			for _, v := range vs {
				pending[v] = true
			}
			if quiet == nil {
				quiet = time.After(settle)
			}
		case <-quiet:
			quiet = nil
			for _, v := range ready {
				delete(pending, v) // is still to be sent
			}
			for v := range pending {
				ready = append(ready, v)
			}
			clear(pending)
		case to <- next:
			ready = ready[1:]
		}
	}
}

// listen opens a socket here, in the caller's namespace, and reads its events in a
// goroutine until ctx ends.
func (w *watch) listen(ctx context.Context, protocol int, event func(message) []store.VNI, groups ...int) {
	f, err := subscribe(protocol, groups...)
	if err != nil {
		w.k.log.Error("cannot hear of outside changes; only audits find them", "protocol", protocol, "err", err)
		return
	}
	if protocol == unix.NETLINK_ROUTE {
		w.learn() // after subscribing, so that no link falls between
	}
	stop := context.AfterFunc(ctx, func() { _ = f.Close() })
	go func() {
		defer stop()
		defer func() { _ = f.Close() }()
		buf := make([]byte, 64<<10)
		for ctx.Err() == nil {
			n, err := f.Read(buf)
			switch {
			case err == nil:
				var out []store.VNI
				for m := range messages(buf[:n]) {
					out = append(out, event(m)...)
				}
				w.send(out...)
			case errors.Is(err, unix.ENOBUFS):
				if protocol == unix.NETLINK_ROUTE {
					w.learn()
				}
				w.all(ctx)
			case ctx.Err() == nil:
				w.k.log.Error("cannot hear of outside changes; only audits find them", "protocol", protocol, "err", err)
				return
			}
		}
	}()
}

func subscribe(protocol int, groups ...int) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return nil, err
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, eventBuffer)
	err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	for _, g := range groups {
		err = errors.Join(err, unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, g))
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "netlink events"), nil
}

// learn reads which link belongs to which network.
func (w *watch) learn() {
	links, err := w.k.links()
	if err != nil {
		w.k.log.Warn("cannot list links to tell events apart", "err", err)
		return
	}
	clear(w.links)
	for _, l := range links {
		w.remember(l)
	}
}

func (w *watch) remember(l *link) seen {
	v, _ := l.vni()
	s := seen{vni: v, link: *l}
	w.links[l.index] = s
	return s
}

// routeEvent returns the networks that an rtnetlink message concerns.
func (w *watch) routeEvent(m message) []store.VNI {
	switch m.typ {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		return w.linkEvent(m)
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		if e, ok := parseEntry(m.data); ok {
			return w.of(e.index, e.master)
		}
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		if len(m.data) < unix.SizeofIfAddrmsg {
			return nil
		}
		index := int32(binary.NativeEndian.Uint32(m.data[4:]))
		if m.typ == unix.RTM_DELADDR && m.data[0] == unix.AF_INET && w.ofHost(index) {
			return append(w.routed(), store.HostVNI)
		}
		if m.data[3] >= unix.RT_SCOPE_LINK {
			return nil
		}
		if own := w.of(index); len(own) > 0 {
			return own
		}
		return []store.VNI{store.HostVNI}
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		if r, ok := parseRoute(m.data); ok {
			return []store.VNI{store.VNI(r.metric)}
		}
		// Of the others only default routes of the main table decide anything.
		if len(m.data) >= unix.SizeofRtMsg && m.data[1] == 0 && m.data[4] == unix.RT_TABLE_MAIN {
			return []store.VNI{store.HostVNI}
		}
	case unix.RTM_NEWTFILTER, unix.RTM_DELTFILTER, unix.RTM_NEWQDISC, unix.RTM_DELQDISC:
		if len(m.data) >= nl.SizeofTcMsg {
			index := int32(binary.NativeEndian.Uint32(m.data[4:]))
			if w.ofHost(index) {
				return []store.VNI{store.HostVNI}
			}
			return w.of(index)
		}
	case unix.RTM_NEWRULE, unix.RTM_DELRULE:
		return []store.VNI{store.HostVNI}
	case unix.RTM_NEWNETCONF:
		const netconfIndex = 1 // NETCONFA_IFINDEX, behind one byte of family
		for t, v := range attrs(m.data[min(4, len(m.data)):]) {
			if t == netconfIndex {
				return w.of(int32(u32(v)))
			}
		}
	}
	return nil
}

// of returns the networks of links.
func (w *watch) of(indexes ...int32) []store.VNI {
	var out []store.VNI
	for _, i := range indexes {
		if s := w.links[i]; s.vni != 0 {
			out = append(out, s.vni)
		}
	}
	return out
}

func (w *watch) linkEvent(m message) []store.VNI {
	l, ok := parseLink(m.data)
	if !ok {
		return nil
	}
	if m.data[0] == unix.AF_BRIDGE { // flags of a port, or a port that left
		return w.of(l.index, l.master)
	}
	before := w.links[l.index]
	var now seen
	if m.typ == unix.RTM_DELLINK {
		delete(w.links, l.index)
	} else {
		now = w.remember(l)
	}
	if m.typ == unix.RTM_NEWLINK && before.link == now.link {
		return nil // counters, carrier
	}
	out := w.of(before.link.master, l.master)
	for _, v := range []store.VNI{before.vni, now.vni} {
		if v != 0 {
			out = append(out, v)
		}
	}
	if before.link.isTunnel() || l.isTunnel() || l.index == w.k.underlay.Load() {
		out = append(out, store.HostVNI)
		if before.link.up && !now.link.up || before.link.master != now.link.master {
			out = append(out, w.routed()...)
		}
	}
	return out
}

// ofHost reports whether a link is the underlay's or a WireGuard device.
func (w *watch) ofHost(index int32) bool {
	s := w.links[index]
	return index == w.k.underlay.Load() || s.link.isTunnel()
}

// routed returns the networks that may have routes through links of the host. With a
// link that goes down or away, loses its last IPv4 address or comes under a VRF the
// kernel takes its IPv4 routes, and tells nobody of them (fib_sync_down_dev in
// net/ipv4/fib_semantics.c, fib_disable_ip in net/ipv4/fib_frontend.c).
func (w *watch) routed() []store.VNI {
	var out []store.VNI
	for _, s := range w.links {
		if s.vni != 0 {
			out = append(out, s.vni)
		}
	}
	return out
}

// ruleEvent returns the host if an nftables message concerns rules of ours or a
// chain in which a rule of ours may stand (include/uapi/linux/netfilter/
// nf_tables.h). Docker changes its own chains with every container.
func ruleEvent(m message) []store.VNI {
	host := []store.VNI{store.HostVNI}
	if m.typ>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.data) < 4 {
		return nil
	}
	var table, chain string
	switch m.typ & 0xff {
	case unix.NFT_MSG_NEWTABLE, unix.NFT_MSG_DELTABLE:
		return host
	case unix.NFT_MSG_NEWRULE, unix.NFT_MSG_DELRULE:
		for t, v := range attrs(m.data[4:]) {
			switch t {
			case unix.NFTA_RULE_TABLE:
				table = text(v)
			case unix.NFTA_RULE_CHAIN:
				chain = text(v)
			}
		}
	case unix.NFT_MSG_NEWCHAIN, unix.NFT_MSG_DELCHAIN:
		for t, v := range attrs(m.data[4:]) {
			switch t {
			case unix.NFTA_CHAIN_TABLE:
				table = text(v)
			case unix.NFTA_CHAIN_NAME:
				chain = text(v)
			}
		}
	}
	if table != "filter" && table != "raw" && table != "nat" && table != "mangle" {
		return nil
	}
	switch chain {
	case "INPUT", "FORWARD", "OUTPUT", "PREROUTING", "POSTROUTING":
		return host
	}
	if strings.HasPrefix(chain, chainPrefix) {
		return host
	}
	return nil
}

// pollLegacy compares the rules of the legacy backend, while it is in use, with
// what was there at the last look.
func (w *watch) pollLegacy(ctx context.Context) {
	// A program that is started inherits the namespace of this thread, which
	// is never given back. In production all threads share one.
	runtime.LockOSThread()
	if !w.k.here() {
		if err := unix.Setns(int(w.k.ns.Fd()), unix.CLONE_NEWNET); err != nil {
			w.k.log.Error("cannot watch the legacy backend from another namespace", "err", err)
			return
		}
	}
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if w.k.rules.name() != legacy {
			continue
		}
		if changed, err := w.k.rules.changed(ctx); err == nil && changed { // of an error the next Read tells
			w.send(store.HostVNI)
		}
	}
}

// pollProgram looks whether somebody cleared a map of the port program, of which the
// kernel tells nobody.
func (w *watch) pollProgram(ctx context.Context) {
	if w.k.program.err != nil {
		return
	}
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for again := 0; ; again-- {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if p := w.k.program; p.used.Load() && (p.cleared.Swap(false) || !p.canaries()) {
			again = 2 // whoever clears a map may need a while
		}
		if again > 0 {
			w.all(ctx)
		}
	}
}

// here reports whether the calling thread is in the kernel's namespace.
func (k *Kernel) here() bool {
	var a, b unix.Stat_t
	return unix.Fstat(int(k.ns.Fd()), &a) == nil && unix.Stat("/proc/thread-self/ns/net", &b) == nil && a.Ino == b.Ino
}
