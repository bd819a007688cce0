package main

import (
	"context"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/weftnet/weft/store"
)

// encryption shows the ways to peers, or changes the key.
func encryption(c *cli) func(context.Context, []string) error {
	return func(ctx context.Context, args []string) error {
		switch {
		case len(args) == 0:
			return showEncryption(ctx, c)
		case args[0] == "rotate" && len(args) == 1:
			if _, err := tell[struct{}](ctx, &c.admin, "/v1/encryption/rotate"); err != nil {
				return err
			}
			if !c.print(struct{}{}) {
				fmt.Fprintln(c.out, "the key is being changed; weft encryption shows both until that is done")
			}
			return nil
		case (args[0] == "revoke" || args[0] == "restore") && len(args) == 2:
			r, err := tell[revokedReply](ctx, &c.admin, "/v1/encryption/"+args[0]+"?host="+url.QueryEscape(args[1]))
			if err != nil || c.print(r) {
				return err
			}
			what := "is revoked: all hosts that share an encrypted network with this one drop it. It may still hold keys of networks: change WEFT_KEY too"
			if args[0] == "restore" {
				what = "is wanted again"
			}
			fmt.Fprintf(c.out, "host %s (%s) %s\n", r.Name, short(r.ID), what)
			return nil
		}
		return usageError(fmt.Sprintf("there is no %.60q; use rotate, revoke HOST, restore HOST, or nothing to look", strings.Join(args, " ")))
	}
}

func showEncryption(ctx context.Context, c *cli) error {
	r, err := ask[encryptionReply](ctx, &c.admin, "/v1/encryption")
	if err != nil || c.print(r) {
		return err
	}
	if len(r.Devices) == 0 {
		fmt.Fprintln(c.out, "no encrypted network on this host")
		return nil
	}
	rows := [][]string{{"DEVICE", "BY", "UDP PORT", "KEY"}}
	for _, d := range r.Devices {
		rows = append(rows, []string{d.Name, by(d.Module), strconv.Itoa(int(d.Port)), d.Key.String()})
	}
	c.table(rows)
	fmt.Fprintf(c.out, "key of %s%s\n\n", clock(r.KeyMade), map[bool]string{true: ", the former one is still in use"}[r.Changes])
	rows = [][]string{{"HOST", "STATE", "DEVICE", "ENDPOINT", "HANDSHAKE", "KEY", "RECEIVED", "SENT", "ADDRESSES"}}
	for _, p := range r.Peers {
		row := []string{p.Host, p.State, orDash(p.Device), "-", "-", "-", "-", "-", "-"}
		if p.Device != "" {
			row = []string{p.Host, p.State, p.Device, endpointText(p), ago(p.Handshake), keyText(p.Key), bytesText(p.Received), bytesText(p.Sent), strconv.Itoa(p.Addresses)}
		}
		rows = append(rows, row)
	}
	c.table(rows)
	for _, v := range r.Revoked {
		fmt.Fprintf(c.out, "revoked: %s (%s)\n", orDash(v.Name), v.ID)
	}
	return nil
}

func by(module bool) string {
	if module {
		return "kernel module"
	}
	return "weft (userspace)"
}

func endpointText(p tunnelPeerReply) string {
	if !p.Endpoint.IsValid() {
		return "-"
	}
	return p.Endpoint.String()
}

func keyText(k store.WGKey) string { return k.String()[:8] + "…" }

func ago(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return time.Since(t).Round(time.Second).String() + " ago"
}

// bytesText has at most four digits, in powers of 1024 as wg(8).
func bytesText(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	f, i := float64(n), 0
	for f >= 1024 && i < len(units)-1 {
		f, i = f/1024, i+1
	}
	return strconv.FormatFloat(f, 'f', min(i, 1), 64) + " " + units[i]
}
