package main

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/weftnet/weft/driver"
)

// Where the plugin may ask Docker: config.json mounts /dev/null there unless the user
// gives it Docker's socket.
const (
	lentSocket  = "/run/docker.sock"
	servicesAge = 30 * time.Second
)

// watchServices logs what weft status says of Swarm's services, once for each, where
// this plugin may ask Docker. It asks between calls, never in one.
func (p *process) watchServices(ctx context.Context) error {
	if st, err := os.Stat(lentSocket); err != nil || st.Mode()&os.ModeSocket == 0 {
		return nil
	}
	docker := &dockerClient{socket: lentSocket}
	told, failing := map[string]bool{}, false
	for {
		found, err := servicesWithout(ctx, docker)
		if err != nil && ctx.Err() == nil && !failing {
			p.log.Warn("services of the Swarm are not looked at; trying on", "err", err)
		}
		if failing = err != nil; !failing {
			now := map[string]bool{}
			for _, f := range found {
				if now[f.Text] = true; !told[f.Text] {
					p.log.Warn("the name of a service of the Swarm leads nowhere", "what", f.Text, "type", f.Remedy)
				}
			}
			told = now
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(servicesAge):
		}
	}
}

// servicesWithout returns the services with a virtual address that nobody answers;
// none where this host is no manager.
func servicesWithout(ctx context.Context, docker *dockerClient) ([]problem, error) {
	var v swarmView
	if err := docker.get(ctx, "/info", &v.info); err != nil || !v.info.Swarm.ControlAvailable {
		return nil, err
	}
	var all []dockerNetwork
	if err := errors.Join(docker.get(ctx, "/networks", &all), docker.get(ctx, "/services", &v.services)); err != nil {
		return nil, err
	}
	for _, n := range all {
		if _, ours := n.Options[driver.OptKey]; ours { // that Weft has allocated
			v.networks = append(v.networks, n)
		}
	}
	v.sort()
	return v.virtual(), nil
}
