package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
)

// plan shows a network's plan, the kernel's state and the difference. A name is
// Docker's matter, so it is looked up there when the plugin does not know it.
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

func askPlan(ctx context.Context, c *cli, name string) (planReply, error) {
	p, err := ask[planReply](ctx, &c.admin, "/v1/plan?network="+url.QueryEscape(name))
	var unknown *httpError
	if !errors.As(err, &unknown) || unknown.status != http.StatusNotFound {
		return p, err
	}
	for id, n := range c.docker.names(ctx) {
		if n == name {
			return ask[planReply](ctx, &c.admin, "/v1/plan?network="+url.QueryEscape(string(id)))
		}
	}
	return p, err
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
