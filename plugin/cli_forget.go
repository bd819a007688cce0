package main

import (
	"context"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"

	"github.com/weftnet/weft/store"
)

// forget has the plugin forget a network that Docker no longer has: docker network rm came
// while the plugin was disabled, and does not come again. Docker is asked from here.
func forget(c *cli) func(context.Context, []string) error {
	return func(ctx context.Context, args []string) error {
		if len(args) != 1 {
			return usageError(fmt.Sprintf("wants one NETWORK (name, id or VNI), got %d arguments", len(args)))
		}
		ours, err := ask[[]networkReply](ctx, &c.admin, "/v1/networks")
		if err != nil {
			return err
		}
		if id := c.admin.pluginID(); id != "" { // another Docker knows none of the networks
			var plugin struct{}
			if err := c.docker.get(ctx, "/plugins/"+id+"/json", &plugin); err != nil {
				return fmt.Errorf("is that the Docker which runs the plugin? %w", err)
			}
		}
		var theirs []dockerNetwork
		if err := c.docker.get(ctx, "/networks", &theirs); err != nil {
			return err
		}
		n, err := meant(args[0], ours, theirs)
		if err != nil {
			return err
		}
		if i := slices.IndexFunc(theirs, func(t dockerNetwork) bool { return t.ID == string(n.ID) }); i >= 0 {
			return fmt.Errorf("Docker has network %.12s, called %s; remove it there: docker network rm %[2]s", n.ID, theirs[i].Name)
		}
		path := "/v1/forget?network=" + url.QueryEscape(string(n.ID))
		if usesPool(theirs, c.docker.pluginName(ctx, c.admin.pluginID()), n.Prefixes()) {
			path += "&pools=keep"
		}
		r, err := tell[forgetReply](ctx, &c.admin, path)
		if err != nil || c.print(r) {
			return err
		}
		fmt.Fprintf(c.out, "%s is forgotten; its links go within seconds\n", networkName(r.Network, r.VNI, nil))
		if len(r.Pools) > 0 {
			fmt.Fprintf(c.out, "with it pool %s\n", strings.Join(r.Pools, ", "))
		}
		return nil
	}
}

// meant returns the network of ours that a user calls so: Docker's name goes before VNI
// and id.
func meant(name string, ours []networkReply, theirs []dockerNetwork) (store.Network, error) {
	var all []store.Network
	for _, n := range ours {
		all = append(all, n.Network)
		if slices.ContainsFunc(theirs, func(t dockerNetwork) bool { return t.Name == name && t.ID == string(n.ID) }) {
			return n.Network, nil
		}
	}
	return match(all, name)
}

// usesPool reports whether Docker has given one of these pools of our IPAM to a network.
func usesPool(theirs []dockerNetwork, plugin string, prefixes []netip.Prefix) bool {
	for _, t := range theirs {
		for _, conf := range t.IPAM.Config {
			p, err := netip.ParsePrefix(conf.Subnet)
			if err == nil && t.IPAM.Driver == plugin && slices.ContainsFunc(prefixes, p.Overlaps) {
				return true
			}
		}
	}
	return false
}
