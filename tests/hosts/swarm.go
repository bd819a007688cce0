package hosts

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
)

// Role is what a host is in a Swarm.
type Role string

const (
	Manager Role = "manager"
	Worker  Role = "worker"
)

// FormSwarm makes the hosts of the lab one Swarm: the first begins it, those after
// it join as managers until there are as many as asked, the rest as workers. It
// returns once every node is ready. Docker refuses it on hosts with LiveRestore.
//
// A node that Swarm did not hear of for three heartbeats is down, and its tasks
// are started elsewhere; heartbeat 0 is Docker's own five seconds.
func (l *Lab) FormSwarm(ctx context.Context, managers int, heartbeat time.Duration) error {
	started := time.Now()
	if managers < 1 || managers > len(l.Hosts) {
		return fmt.Errorf("a Swarm of %d hosts cannot have %d managers", len(l.Hosts), managers)
	}
	first := l.Hosts[0]
	args := append([]string{"swarm", "init"}, first.swarmAddress()...)
	if heartbeat > 0 {
		args = append(args, "--dispatcher-heartbeat", heartbeat.String())
	}
	if _, err := first.Docker(ctx, args...); err != nil {
		return err
	}
	// One after the other: each new manager changes what a majority is.
	for _, h := range l.Hosts[1:managers] {
		if err := h.JoinSwarm(ctx, first, Manager); err != nil {
			return err
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	for _, h := range l.Hosts[managers:] {
		g.Go(func() error { return h.JoinSwarm(gctx, first, Worker) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for _, h := range l.Hosts {
		if err := first.WaitNode(ctx, h, "ready"); err != nil {
			return err
		}
	}
	l.logf("lab %s: a Swarm of %d managers and %d workers in %.1f s", l.Name, managers, len(l.Hosts)-managers, time.Since(started).Seconds())
	return nil
}

// JoinSwarm makes the host a member of the Swarm of another host, which must be a
// manager.
func (h *Host) JoinSwarm(ctx context.Context, manager *Host, as Role) error {
	token, err := manager.Docker(ctx, "swarm", "join-token", "--quiet", string(as))
	if err != nil {
		return err
	}
	args := append([]string{"swarm", "join", "--token", token}, h.swarmAddress()...)
	_, err = h.Docker(ctx, append(args, manager.Address.String())...)
	return err
}

func (h *Host) swarmAddress() []string {
	return []string{"--advertise-addr", h.Address.String(), "--listen-addr", h.Address.String()}
}

// LeaveSwarm takes the host out of its Swarm, also where it is a manager. The
// Swarm still lists it as a node that is down.
func (h *Host) LeaveSwarm(ctx context.Context) error {
	_, err := h.Docker(ctx, "swarm", "leave", "--force")
	return err
}

// Node is a member of a Swarm as a manager sees it.
type Node struct {
	ID           string
	Host         string // name
	Role         Role
	Availability string // "active", "pause" or "drain"
	State        string // "unknown", "down", "ready" or "disconnected"
	Leader       bool
}

// Nodes lists the members of the Swarm of which the host is a manager. A host that
// left and joined again is there twice.
func (h *Host) Nodes(ctx context.Context) ([]Node, error) {
	var raw []struct {
		ID   string
		Spec struct {
			Role         Role
			Availability string
		}
		Description   struct{ Hostname string }
		Status        struct{ State string }
		ManagerStatus struct{ Leader bool }
	}
	if err := h.ask(ctx, "/nodes", &raw); err != nil {
		return nil, err
	}
	nodes := make([]Node, len(raw))
	for i, r := range raw {
		nodes[i] = Node{ID: r.ID, Host: r.Description.Hostname, Role: r.Spec.Role,
			Availability: r.Spec.Availability, State: r.Status.State, Leader: r.ManagerStatus.Leader}
	}
	return nodes, nil
}

// WaitNode waits until this host, a manager, sees another in a state of Node.
func (h *Host) WaitNode(ctx context.Context, node *Host, state string) error {
	return h.waitSwarm(ctx, fmt.Sprintf("node %s to be %s", node.Name, state), func(ctx context.Context) error {
		nodes, err := h.Nodes(ctx)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(nodes, func(n Node) bool { return n.Host == node.Name && n.State == state }) {
			return fmt.Errorf("nodes are %+v", nodes)
		}
		return nil
	})
}

// WaitLeader waits until the Swarm has a leader other than the host given, which
// may be nil, and returns it. Every host that is a manager and answers is asked.
func (l *Lab) WaitLeader(ctx context.Context, other *Host) (*Host, error) {
	var leader *Host
	err := l.Hosts[0].waitSwarm(ctx, "a leader", func(ctx context.Context) error {
		var errs []error
		for _, h := range l.Hosts {
			if h == other || !h.running() {
				continue
			}
			nodes, err := h.Nodes(ctx)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			for _, n := range nodes {
				if n.Leader && l.Host(n.Host) != other {
					leader = l.Host(n.Host)
					return nil
				}
			}
		}
		return errors.Join(append(errs, errors.New("no host knows one"))...)
	})
	return leader, err
}

func (h *Host) running() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.daemon != nil
}

// waitSwarm waits until ok returns nil. The error says what ok found last.
func (h *Host) waitSwarm(ctx context.Context, what string, ok func(context.Context) error) error {
	var last error
	err := waitFor(ctx, 100*time.Millisecond, what, func() (bool, error) {
		// A manager without a leader lets its clients wait.
		actx, cancel := context.WithTimeout(ctx, 3*time.Second)
		defer cancel()
		now := ok(actx)
		if now != nil && ctx.Err() == nil {
			last = now
		}
		return now == nil, nil
	})
	if err != nil && last != nil {
		return fmt.Errorf("%w; %w", err, last)
	}
	return err
}

// ask reads one answer of dockerd's API.
func (h *Host) ask(ctx context.Context, path string, into any) error {
	resp, err := unixClient(h.socket()).Do(request(ctx, http.MethodGet, path))
	if err != nil {
		return fmt.Errorf("host %s: %w", h.Name, err)
	}
	defer func() { _ = resp.Body.Close() }()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return fmt.Errorf("host %s: GET %s: %w", h.Name, path, err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("host %s: GET %s: status %d: %s", h.Name, path, resp.StatusCode, strings.TrimSpace(string(raw)))
	}
	return json.Unmarshal(raw, into)
}
