package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	api "github.com/docker/go-plugins-helpers/ipam"
	"github.com/docker/go-plugins-helpers/network"
)

// journalFolder lies in the state folder.
const journalFolder = "calls"

// journal holds the requests in flight, one file each, so that the next process
// can end what a kill has cut off. Docker sends clean-up once and ignores that it
// failed: such a call is done then. It takes a cut-off request for a failed one
// and sends no clean-up for it: what that made is removed then.
//
// The files are not synced: they need to survive the process, not the machine.
// What a kill hits before the file is written, or after it is removed and before
// Docker has the answer, stays for the audits. A nil journal does nothing.
type journal struct {
	dir  string
	boot string // begins the names of this process's files
	log  *slog.Logger

	mu     sync.Mutex // guards what follows
	next   int
	failed bool // the last write failed, and it was logged
}

// journalled says for which methods a request is kept. A Join that was cut off is
// followed by Docker's own DeleteEndpoint; a leaked lease alone waits for the
// audit.
var journalled = map[string]bool{
	"NetworkDriver.CreateNetwork": true, "NetworkDriver.DeleteNetwork": true,
	"NetworkDriver.CreateEndpoint": true, "NetworkDriver.Leave": true, "NetworkDriver.DeleteEndpoint": true,
	"IpamDriver.RequestPool": true, "IpamDriver.ReleasePool": true, "IpamDriver.ReleaseAddress": true,
}

// journalEntry is the content of a file.
type journalEntry struct {
	Method string          `json:"method"`
	Body   json.RawMessage `json:"body"`
}

func openJournal(dir string, log *slog.Logger) *journal {
	j := &journal{dir: dir, boot: fmt.Sprintf("%d", time.Now().UnixNano()), log: log}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		j.report(err)
	}
	return j
}

// begin keeps a request until the function that it returns is called; calling it
// again does nothing. A request that cannot be kept is served all the same.
func (j *journal) begin(method string, body []byte) (end func()) {
	if j == nil || !journalled[method] {
		return func() {}
	}
	j.mu.Lock()
	j.next++
	path := filepath.Join(j.dir, fmt.Sprintf("%s-%08d", j.boot, j.next))
	j.mu.Unlock()
	raw, err := json.Marshal(journalEntry{method, body})
	if err != nil {
		return func() {} // the body is no JSON, so the call will fail
	}
	j.report(os.WriteFile(path, raw, 0o600))
	return sync.OnceFunc(func() {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			j.report(err)
		}
	})
}

// report logs a failure once, until it works again.
func (j *journal) report(err error) {
	j.mu.Lock()
	was := j.failed
	j.failed = err != nil
	j.mu.Unlock()
	if err != nil && !was {
		j.log.Error("requests in flight cannot be kept; what a crash cuts off stays for the audits", "err", err)
	}
}

// finish ends what earlier processes left, in the order in which it came. What
// fails stays for the next start.
func (j *journal) finish(ctx context.Context, svc *services) {
	entries, err := os.ReadDir(j.dir) // sorted by name: by process, then by number
	if err != nil {
		j.report(err)
		return
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), j.boot+"-") {
			continue
		}
		path := filepath.Join(j.dir, e.Name())
		raw, err := os.ReadFile(path)
		if err != nil {
			j.report(err)
			continue
		}
		var call journalEntry
		if json.Unmarshal(raw, &call) == nil { // else it was cut off in the writing, and did nothing yet
			j.log.Warn("call was cut off; it is ended now", "method", call.Method, "id", requestID(call.Body))
			if err := finishCall(ctx, svc, call); err != nil {
				j.log.Error("a call that was cut off cannot be ended", "method", call.Method, "id", requestID(call.Body), "err", err)
				continue
			}
		}
		j.report(os.Remove(path))
	}
}

func finishCall(ctx context.Context, svc *services, call journalEntry) error {
	switch call.Method {
	case "NetworkDriver.CreateNetwork":
		return with(ctx, call, func(ctx context.Context, r network.CreateNetworkRequest) error {
			return svc.driver.AbandonNetwork(ctx, r.NetworkID)
		})
	case "NetworkDriver.CreateEndpoint":
		return with(ctx, call, func(ctx context.Context, r network.CreateEndpointRequest) error {
			return svc.driver.AbandonEndpoint(ctx, r.NetworkID, r.EndpointID)
		})
	case "IpamDriver.RequestPool":
		return svc.ipam.DropUnused(ctx)
	case "NetworkDriver.DeleteNetwork":
		return with(ctx, call, withoutAnswer(svc.driver.DeleteNetwork))
	case "NetworkDriver.Leave":
		return with(ctx, call, withoutAnswer(svc.driver.Leave))
	case "NetworkDriver.DeleteEndpoint":
		return with(ctx, call, withoutAnswer(svc.driver.DeleteEndpoint))
	case "IpamDriver.ReleasePool":
		return with(ctx, call, func(ctx context.Context, r api.ReleasePoolRequest) error { return svc.ipam.ReleaseCutOff(ctx, r) })
	case "IpamDriver.ReleaseAddress":
		return with(ctx, call, withoutAnswer(svc.ipam.ReleaseAddress))
	}
	return nil
}

// with decodes the request. One that cannot be decoded did nothing.
func with[Req any](ctx context.Context, call journalEntry, fn func(context.Context, Req) error) error {
	r, err := decode[Req](call.Method, call.Body)
	if err != nil {
		return nil
	}
	return fn(ctx, r)
}

func withoutAnswer[Req any](fn func(context.Context, Req) (struct{}, error)) func(context.Context, Req) error {
	return func(ctx context.Context, r Req) error {
		_, err := fn(ctx, r)
		return err
	}
}
