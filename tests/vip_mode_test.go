package tests

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
	"testing"
	"time"
)

// modes asks services on networks of the other modes: their packets go into no bridge.
func (v *vips) modes(t *testing.T) {
	for i, mode := range []string{"mode=routed", "encrypted"} {
		s := &vips{swarm: v.swarm}
		network := fmt.Sprint("other", i) // Docker removes the one before when it comes to it
		s.network(t, network, 61+i, "-o", mode)
		s.service(t, "there", 3, "--network", network, "--endpoint-mode", "vip")
		s.address = s.virtual(t, "there")
		for _, h := range s.lab.Hosts {
			c := run(t, h, "asks", "--network", network)
			s.clients = append(s.clients, c)
			s.balanced(t, c, 3)
			reach(t, c, s.address.String())
		}
		figure(t, "VIP with "+mode, 3*60, "answered from every host, by all tasks")
		for _, c := range s.clients {
			docker(t, c.Host, "rm", "-f", "asks")
		}
		s.removeServices(t, "there")
		s.removeNetworks(t, network)
	}
}

// resets cuts a task off from its client, and removes it: the client is told, also one
// that only waits for what the task has to say.
func (v *vips) resets(t *testing.T) {
	const port = 9002
	v.echo(t, port)
	conns := v.connect(t, v.clients[0], 30, port)
	for _, c := range conns {
		if err := roundTrip(c); err != nil {
			t.Fatal(err)
		}
	}
	// The listeners are this process's: no container's end closes the connections.
	v.update(t, "web", 3, "--force")
	v.settled(t)
	// Docker ends the former tasks when it comes to it.
	var asking, waiting int
	end := time.Now().Add(60 * time.Second)
	for i, c := range conns {
		var err error
		for ; err == nil && i%2 == 0; pause(t, 100*time.Millisecond) {
			if err = roundTrip(c); err == nil && time.Now().After(end) {
				err = errors.New("it is answered")
			}
		}
		if i%2 == 1 {
			_ = c.SetDeadline(end)
			_, err = c.Read(make([]byte, 1))
		}
		switch {
		case !wasReset(err):
			t.Errorf("connection %d to a task that is gone: %v", i, err)
		case i%2 == 0:
			asking++
		default:
			waiting++
		}
		_ = c.Close()
	}
	figure(t, "VIP connections of removed tasks", len(conns), "%d of clients that ask reset, %d of such that only wait; target all", asking, waiting)
}

func wasReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// gone removes the service, also where the plugin dies of it: nobody answers, and clients
// that only wait are told.
func (v *vips) gone(t *testing.T) {
	const port = 9003
	v.echo(t, port)
	var conns []net.Conn
	for _, c := range v.clients {
		conns = append(conns, v.connect(t, c, 5, port)...)
	}
	for _, c := range conns {
		if err := roundTrip(c); err != nil {
			t.Fatal(err)
		}
	}
	dies := diesAt(t, v.lab.Hosts[1], "kernel.delete.service")
	docker(t, v.lab.Hosts[0], "service", "rm", "web")
	dies()
	for _, c := range v.clients {
		ns := netnsOf(t, c)
		eventually(t, 60*time.Second, "the address of a service that is gone answers nobody", func(context.Context) error {
			if name, err := answerer(ns, v.address.String()); err == nil {
				return fmt.Errorf("%s answers", name)
			}
			return nil
		})
	}
	reset, end := 0, time.Now().Add(30*time.Second)
	for i, c := range conns {
		_ = c.SetDeadline(end)
		if _, err := c.Read(make([]byte, 1)); wasReset(err) {
			reset++
		} else {
			t.Errorf("connection %d to a service that is gone: %v", i, err)
		}
		_ = c.Close()
	}
	figure(t, "VIP connections of a removed service", len(conns), "%d of clients that only wait reset; target all", reset)
}
