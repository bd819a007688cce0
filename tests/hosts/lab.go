// Package hosts makes many real Docker hosts on one machine, for the tests and
// the demo.
//
// A Lab is an Underlay (a network namespace with a bridge: the cable between the
// hosts) and some Hosts. A Host is a network namespace plus a private mount
// namespace, with its own dockerd, Docker socket, storage and iptables. A Probe
// counts lost packets between two containers, an Inventory lists what a host
// holds, so that two of them show a leak.
//
// Every name of a lab begins with "wl-" and the id of the process that made it.
// Close removes all of it; a lab whose process died without that is removed by
// the next New. Nothing else on the machine is touched: not its network, not its
// own Docker.
//
// All of it needs root.
package hosts

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	// root holds one folder per lab. On disk, also where /tmp is memory.
	root = "/var/tmp/weft-lab"
	// prefix begins every name of a lab: wl-<process id>-<number>.
	prefix = "wl-"
	// closeTimeout bounds the removal of a lab.
	closeTimeout = 90 * time.Second
)

// Options of a lab.
type Options struct {
	Hosts []HostOptions
	// MTU of the underlay and of the hosts' links to it; 0 means 1500.
	MTU int
	// Logf gets a line about each large step; may be nil.
	Logf func(format string, args ...any)
}

// Lab is a set of Docker hosts on one cable.
type Lab struct {
	Name     string // also the name of its cgroup
	Dir      string // everything it has on disk
	Underlay *Underlay
	Hosts    []*Host
	routers  []*Router

	logf  func(format string, args ...any)
	close func() error
	abort func() bool // ends the watch on the context of New
}

// New makes a lab and waits until every dockerd answers. When ctx ends the lab
// closes itself; the caller still calls Close to wait for that.
func New(ctx context.Context, o Options) (*Lab, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("docker hosts on one machine need root; run with sudo")
	}
	if err := Sweep(ctx); err != nil {
		return nil, fmt.Errorf("remove what dead labs left: %w", err)
	}
	l := &Lab{logf: o.Logf}
	if l.logf == nil {
		l.logf = func(string, ...any) {}
	}
	if err := l.claim(); err != nil {
		return nil, err
	}
	l.close = sync.OnceValue(l.remove)
	if err := l.build(ctx, o); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	l.abort = context.AfterFunc(ctx, func() { _ = l.close() })
	return l, nil
}

// Host returns the host of that name, or nil.
func (l *Lab) Host(name string) *Host {
	for _, h := range l.Hosts {
		if h.Name == name {
			return h
		}
	}
	return nil
}

// Close stops the hosts and removes everything the lab made. Calling it again
// returns the first result.
func (l *Lab) Close() error {
	if l.abort != nil {
		l.abort()
	}
	return l.close()
}

// claim takes the next free name. Making the folder is what takes it.
func (l *Lab) claim() error {
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	for n := 1; ; n++ {
		name := prefix + strconv.Itoa(os.Getpid()) + "-" + strconv.Itoa(n)
		err := os.Mkdir(filepath.Join(root, name), 0o755)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return err
		}
		l.Name, l.Dir = name, filepath.Join(root, name)
		return errors.Join(writeOwner(l.Dir), makeCovered(l.Dir))
	}
}

func (l *Lab) build(ctx context.Context, o Options) error {
	started := time.Now()
	mtu := o.MTU
	if mtu == 0 {
		mtu = 1500
	}
	var err error
	if l.Underlay, err = newUnderlay(ctx, l.Name, mtu); err != nil {
		return err
	}
	for i, ho := range o.Hosts {
		h := &Host{
			Name:     ho.Name,
			Address:  netip.AddrFrom4([4]byte{192, 0, 2, byte(10 + i)}),
			Address6: netip.MustParseAddr(fmt.Sprintf("2001:db8::%x", 0x10+i)),
			Dir:      filepath.Join(l.Dir, ho.Name),
			lab:      l,
			options:  ho,
			netns:    l.Name + "-" + ho.Name,
			Port:     weftPort,
		}
		if h.Name == "" || len(h.Name) > 13 || l.Host(h.Name) != nil {
			return fmt.Errorf("host name %q is empty, longer than 13 characters or used twice", h.Name)
		}
		l.Hosts = append(l.Hosts, h)
		if ho.NAT != "" || ho.Router != "" {
			if err := l.putBehind(ctx, h, ho.NAT, ho.Router); err != nil {
				return err
			}
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	if InGuest() {
		g.SetLimit(1) // a dockerd gives its containerd 15 seconds to start
	}
	for _, h := range l.Hosts {
		g.Go(func() error {
			if err := h.start(gctx); err != nil {
				return fmt.Errorf("host %s: %w", h.Name, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	l.logf("lab %s: %d hosts up in %.1f s", l.Name, len(l.Hosts), time.Since(started).Seconds())
	return nil
}

// remove is the body of Close. It does not depend on the caller's context, which
// may be the reason why we are here.
func (l *Lab) remove() error {
	ctx, cancel := context.WithTimeout(context.Background(), Patience(closeTimeout))
	defer cancel()
	var g errgroup.Group
	for _, h := range l.Hosts {
		g.Go(func() error { return h.stop(ctx) })
	}
	return errors.Join(g.Wait(), removeLab(ctx, l.Name))
}
