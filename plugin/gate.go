package main

import (
	"context"
	"fmt"
	"log/slog"
	"sync"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/ipam"
	"github.com/weftnet/weft/store"
)

// services is what serves calls, once the database is open and the loop runs.
// The fields do not change.
type services struct {
	db      *store.DB
	kernel  *kernel.Kernel
	loop    *dataplane.Loop
	driver  *driver.Driver
	ipam    *ipam.IPAM
	cluster *cluster
	rotator *rotator
	log     *slog.Logger
	rebuilt string // what was rebuilt from the kernel at this start, or ""
}

// gate is the door between calls and the services: the sockets are open long
// before the database is. While nothing is known, calls wait; when the services
// cannot come up, calls get the reason; it may still open later.
type gate struct {
	mu      sync.Mutex // guards what follows
	stage   string     // what the start does now, in words
	svc     *services
	err     error
	settled chan struct{} // closed once svc or err is set for the first time
}

func newGate() *gate { return &gate{stage: "starting", settled: make(chan struct{})} }

// at says what the start does now.
func (g *gate) at(stage string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stage = stage
}

// open lets calls through.
func (g *gate) open(svc *services) {
	g.settle(svc, nil)
	g.at("serving")
}

// fail answers calls with err until open is called.
func (g *gate) fail(err error) { g.settle(nil, err) }

func (g *gate) settle(svc *services, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.svc, g.err = svc, err
	select {
	case <-g.settled:
	default:
		close(g.settled)
	}
}

// peek returns the present state without waiting; svc and err are nil while it
// starts.
func (g *gate) peek() (svc *services, stage string, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.svc, g.stage, g.err
}

// wait returns the services, or why there are none. When ctx ends first the error
// names what the start is doing.
func (g *gate) wait(ctx context.Context) (*services, error) {
	select {
	case <-g.settled:
	case <-ctx.Done():
		_, stage, _ := g.peek()
		return nil, fmt.Errorf("weft is not ready yet: still %s; try again in a moment", stage)
	}
	svc, _, err := g.peek()
	if err != nil {
		return nil, fmt.Errorf("weft cannot work: %w", err)
	}
	return svc, nil
}
