package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/weftnet/weft/store"
)

const (
	dockerDefault = "/var/run/docker.sock"
	// dockerLimit bounds one question to Docker; dockerd answers none while it
	// starts.
	dockerLimit = 10 * time.Second
)

// dockerClient asks Docker's API on the host. The plugin itself does that nowhere but
// in watchServices.
type dockerClient struct {
	socket string // "" until find
}

// What Docker's API tells, as far as it is compared.
type (
	dockerNetwork struct {
		ID, Name, Driver, Scope string
		ConfigOnly              bool
		ConfigFrom              struct{ Network string }
		Options                 map[string]string
		IPAM                    struct {
			Driver string
			Config []struct {
				Subnet, IPRange, Gateway string
				AuxiliaryAddresses       map[string]string
			}
		}
		Containers map[string]dockerEndpoint // by container id, or "ep-" and endpoint id
	}
	dockerEndpoint struct {
		Name, EndpointID, MacAddress, IPv4Address, IPv6Address string
	}
	dockerContainer struct {
		ID              string
		Names           []string
		State           string
		Labels          map[string]string
		NetworkSettings struct {
			Networks map[string]struct{ NetworkID, EndpointID, IPAddress string }
		}
	}
)

func (d *dockerClient) find() error {
	if d.socket != "" {
		return nil
	}
	host := os.Getenv("DOCKER_HOST")
	if host == "" {
		host = "unix://" + dockerDefault
	}
	path, ok := strings.CutPrefix(host, "unix://")
	if !ok {
		return fmt.Errorf("DOCKER_HOST=%.80q is not a Unix socket; weft asks the Docker of this host, so set it to unix:///path", host)
	}
	d.socket = path
	return nil
}

// get decodes a path of Docker's API into v.
func (d *dockerClient) get(ctx context.Context, path string, v any) error {
	if err := d.find(); err != nil {
		return err
	}
	raw, err := getUnix(ctx, d.socket, path, dockerLimit)
	var bad *httpError
	if errors.As(err, &bad) {
		var e struct{ Message string }
		if json.Unmarshal([]byte(bad.text), &e) == nil && e.Message != "" {
			bad.text = e.Message
		}
	}
	if err != nil {
		return fmt.Errorf("ask Docker at %s: %w", d.socket, err)
	}
	if err := json.Unmarshal(raw, v); err != nil {
		return fmt.Errorf("Docker's answer to %s: %w", path, err)
	}
	return nil
}

// networks returns Docker's networks with their endpoints, all or those of which
// want is true.
func (d *dockerClient) networks(ctx context.Context, want func(dockerNetwork) bool) ([]dockerNetwork, error) {
	var all, out []dockerNetwork
	if err := d.get(ctx, "/networks", &all); err != nil {
		return nil, err
	}
	for _, n := range all {
		if !want(n) {
			continue
		}
		var full dockerNetwork // the list lacks endpoints on some engines
		err := d.get(ctx, "/networks/"+url.PathEscape(n.ID), &full)
		var gone *httpError
		if errors.As(err, &gone) && gone.status == 404 {
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, full)
	}
	return out, nil
}

// names returns Docker's names of networks, empty when Docker cannot be asked: they
// are an ornament.
func (d *dockerClient) names(ctx context.Context) map[store.NetworkID]string {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	var all []dockerNetwork
	if err := d.get(ctx, "/networks", &all); err != nil {
		return nil
	}
	out := map[store.NetworkID]string{}
	for _, n := range all {
		out[store.NetworkID(n.ID)] = n.Name
	}
	return out
}

// containers returns the names of the containers by their endpoints' ids.
func (d *dockerClient) containers(ctx context.Context) map[store.EndpointID]string {
	out := map[store.EndpointID]string{}
	for id, c := range d.containersByEndpoint(ctx) {
		if len(c.Names) > 0 {
			out[id] = strings.TrimPrefix(c.Names[0], "/")
		}
	}
	return out
}

func (d *dockerClient) containersByEndpoint(ctx context.Context) map[store.EndpointID]dockerContainer {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	var all []dockerContainer
	if err := d.get(ctx, "/containers/json?all=1", &all); err != nil {
		return nil
	}
	out := map[store.EndpointID]dockerContainer{}
	for _, c := range all {
		for _, n := range c.NetworkSettings.Networks {
			if n.EndpointID != "" {
				out[store.EndpointID(n.EndpointID)] = c
			}
		}
	}
	return out
}

// pluginName returns the name under which Docker knows the plugin with the id.
func (d *dockerClient) pluginName(ctx context.Context, id string) string {
	var p struct{ Name string }
	if id == "" || d.get(ctx, "/plugins/"+id+"/json", &p) != nil || p.Name == "" {
		return "weft:latest"
	}
	return p.Name
}
