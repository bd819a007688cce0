package hosts

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"
)

// Task is one task of a Swarm: of a service, or the attachment of a container that
// docker run put on a network of the Swarm.
type Task struct {
	ID        string
	Service   string // id; empty for an attachment
	Slot      int    // 0 in a global service
	Host      string // name; empty before the scheduler chose
	Desired   string // "running", "shutdown", …
	State     string // "pending", "preparing", "running", "failed", …
	Err       string
	Container string                // id; empty before it is made
	Addresses map[string]netip.Addr // by the network's name, IPv4
}

// Tasks lists the tasks of a service, by name or id, or all of the Swarm when it is
// empty. The host must be a manager.
func (h *Host) Tasks(ctx context.Context, service string) ([]Task, error) {
	nodes, err := h.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	path := "/tasks"
	if service != "" {
		filter, err := json.Marshal(map[string][]string{"service": {service}})
		if err != nil {
			return nil, err
		}
		path += "?filters=" + url.QueryEscape(string(filter))
	}
	var raw []rawTask
	if err := h.ask(ctx, path, &raw); err != nil {
		return nil, err
	}
	names := map[string]string{}
	for _, n := range nodes {
		names[n.ID] = n.Host
	}
	tasks := make([]Task, len(raw))
	for i, r := range raw {
		if tasks[i], err = r.task(names[r.NodeID]); err != nil {
			return nil, err
		}
	}
	return tasks, nil
}

// rawTask is the part of Docker's task that is asked for.
type rawTask struct {
	ID, NodeID, ServiceID, DesiredState string
	Slot                                int
	Status                              struct {
		State, Err      string
		ContainerStatus struct{ ContainerID string }
	}
	NetworksAttachments []struct {
		Network struct {
			Spec struct{ Name string }
		}
		Addresses []string
	}
}

func (r rawTask) task(host string) (Task, error) {
	t := Task{ID: r.ID, Service: r.ServiceID, Slot: r.Slot, Host: host, Desired: r.DesiredState,
		State: r.Status.State, Err: r.Status.Err, Container: r.Status.ContainerStatus.ContainerID, Addresses: map[string]netip.Addr{}}
	for _, a := range r.NetworksAttachments {
		for _, text := range a.Addresses {
			p, err := netip.ParsePrefix(text)
			if err != nil {
				return t, fmt.Errorf("task %s: %w", r.ID, err)
			}
			if p.Addr().Is4() {
				t.Addresses[a.Network.Spec.Name] = p.Addr()
			}
		}
	}
	return t, nil
}

// Live says whether the task should run.
func (t Task) Live() bool { return t.Desired == "running" || t.Desired == "ready" }

// WaitService waits until a service has exactly n tasks that should run, and all
// of them do; it returns them. Tasks of earlier turns may be listed as ended.
func (h *Host) WaitService(ctx context.Context, service string, n int) ([]Task, error) {
	var live []Task
	err := h.waitSwarm(ctx, fmt.Sprintf("%d tasks of service %s", n, service), func(ctx context.Context) error {
		all, err := h.Tasks(ctx, service)
		if err != nil {
			return err
		}
		live = slices.DeleteFunc(slices.Clone(all), func(t Task) bool { return !t.Live() })
		up := slices.ContainsFunc(live, func(t Task) bool { return t.State != "running" || t.Container == "" })
		if len(live) != n || up {
			return fmt.Errorf("its tasks are %s", tasksText(all))
		}
		return nil
	})
	return live, err
}

// tasksText is one line with what matters of each task.
func tasksText(tasks []Task) string {
	var parts []string
	for _, t := range tasks {
		parts = append(parts, strings.TrimSpace(fmt.Sprintf("%.8s on %q %s, wanted %s %s", t.ID, t.Host, t.State, t.Desired, t.Err)))
	}
	return strings.Join(parts, "; ")
}

// Container returns the container of a task that runs on one of the lab's hosts.
func (l *Lab) Container(t Task) Container {
	return Container{Host: l.Host(t.Host), Name: t.Container}
}
