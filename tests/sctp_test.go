package tests

import (
	"strings"
	"testing"
)

// sctp publishes an SCTP port. A kernel without SCTP lets Docker's bridge have none, and
// Weft refuses it as well; one with SCTP gives it to one container alone.
func (r *routed) sctp(t *testing.T) {
	a := r.lab.Hosts[0]
	publish := func(name string, args ...string) error {
		_, err := a.Run(t.Context(), name, append(args, "-p", "3868:3868/sctp")...)
		return err
	}
	bridge := publish("sctp1")
	_, _ = a.Docker(t.Context(), "rm", "--force", "sctp1")
	weft := publish("sctp2", "--network", "app", "--ip6", "fd00:80::e1")
	if (bridge == nil) != (weft == nil) {
		t.Errorf("an SCTP port: Docker's bridge %v, Weft %v", bridge, weft)
	}
	out, err := a.Exec(t.Context(), "weft", "ports")
	if err != nil {
		t.Fatal(err)
	}
	if weft != nil {
		if !strings.Contains(weft.Error(), "0.0.0.0:3868/sctp failed: this host's kernel has no SCTP") || strings.Contains(out, "3868") {
			t.Errorf("an SCTP port on a kernel without SCTP: %v; published:\n%s", weft, out)
		}
	} else {
		if !strings.Contains(out, "0.0.0.0:3868->3868/sctp") {
			t.Errorf("the SCTP port is not published:\n%s", out)
		}
		for name, args := range map[string][]string{"sctp3": {"--network", "app", "--ip6", "fd00:80::e2"}, "sctp4": nil} {
			if err := publish(name, args...); err == nil || !strings.Contains(err.Error(), "3868") {
				t.Errorf("an SCTP port that another has: %v", err)
			}
		}
	}
	removeOthers(t, a)
	figure(t, r.way+": an SCTP port on "+r.name, 1, "Docker's bridge: %t, Weft: %t (the same)", bridge == nil, weft == nil)
}
