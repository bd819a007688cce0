package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
)

// plan shows a network's plan, the kernel's state and the difference.
func plan(c *cli) func(context.Context, []string) error {
	return func(ctx context.Context, args []string) error {
		if len(args) != 1 {
			return usageError(fmt.Sprintf("wants one NETWORK (name, id, VNI, or \"host\"), got %d arguments", len(args)))
		}
		p, err := askPlan(ctx, c, args[0])
		if err != nil {
			return err
		}
		if !c.print(p) {
			printPlan(c, p)
		}
		if len(p.Ops) > 0 {
			return errFound
		}
		return nil
	}
}

// askPlan tries Docker's name first: a network may be called as the id of another begins,
// or by a number.
func askPlan(ctx context.Context, c *cli, name string) (planReply, error) {
	of := func(name string) (planReply, error) {
		return ask[planReply](ctx, &c.admin, "/v1/plan?network="+url.QueryEscape(name))
	}
	if name == "host" { // one of Docker's own networks, too
		return of(name)
	}
	for id, n := range c.docker.names(ctx) {
		if n != name {
			continue
		}
		p, err := of(string(id))
		var unknown *httpError
		if !errors.As(err, &unknown) || unknown.status != http.StatusNotFound {
			return p, err
		}
	}
	return of(name)
}

func printPlan(c *cli, p planReply) {
	fmt.Fprintf(c.out, "%s: %d objects wanted, %d there, %d changes due\n", networkName(p.Network, p.VNI, nil), len(p.Want), len(p.Have), len(p.Ops))
	section := func(title string, lines []string) {
		fmt.Fprintf(c.out, "\n%s\n", title)
		if len(lines) == 0 {
			fmt.Fprintln(c.out, "  nothing")
		}
		for _, l := range lines {
			fmt.Fprintf(c.out, "  %s\n", strings.ReplaceAll(l, "\n", "\n  "))
		}
	}
	section("wanted", p.Want)
	section("there", p.Have)
	section("difference", p.Ops)
}
