package tests

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// rotations changes the keys of all hosts, of one after the other and of several at
// once, while a probe counts.
func (e *encrypted) rotations(t *testing.T, probe *hosts.Probe) {
	turns := 1
	if soak() {
		turns = 20
	}
	done := 0
	for range turns {
		for _, group := range [][]*hosts.Host{e.lab.Hosts[:1], e.lab.Hosts[1:2], e.lab.Hosts} {
			changeKeys(t, e.lab.Hosts, group)
			done += len(group)
		}
	}
	report := lossless(t, probe)
	figure(t, "encrypted: key changed on "+e.name, done, "%d of %d packets lost (target 0)", report.Lost, report.Sent)
}

// changeKeys changes the keys of some hosts at once, and returns when all others go by the
// new ones.
func changeKeys(t *testing.T, all, of []*hosts.Host) {
	t.Helper()
	before := map[string]bool{}
	for _, h := range of {
		before[keyOf(t, h)] = true
		if out, err := h.Exec(t.Context(), "weft", "encryption", "rotate"); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	for _, h := range of {
		eventually(t, 60*time.Second, "host "+h.Name+" has another key", func(context.Context) error {
			v := view[encryptionView](t, h, "encryption")
			if v.Changes || len(v.Devices) != 1 || before[v.Devices[0].Key] {
				return fmt.Errorf("it has %+v", v)
			}
			for _, o := range all {
				if seen := keysOf(t, o, h); o != h && !slices.Equal(seen, []string{v.Devices[0].Key}) {
					return fmt.Errorf("host %s sends to it under %q", o.Name, seen)
				}
			}
			return nil
		})
	}
}

// often asks for another key each second, whether the last change is over or not. A
// change takes some fifteen seconds; meanwhile all others are refused with that reason.
// The other host must see the keys change.
func (e *encrypted) often(t *testing.T) {
	a, b := e.lab.Hosts[0], e.lab.Hosts[1]
	from, to := hosts.Container{Host: a, Name: "encr"}, hosts.Container{Host: b, Name: "encr"}
	first := keyOf(t, a)
	seen := map[string]bool{first: true}
	probe := startProbe(t, from, to, addressOf(t, to, "encr"))
	seconds, taken, refused := 10, 0, 0
	if soak() {
		seconds = 60
	}
	look := func() (now []string) {
		now = keysOf(t, b, a)
		for _, k := range now {
			seen[k] = true
		}
		return now
	}
	for range seconds {
		switch out, err := a.Exec(t.Context(), "weft", "encryption", "rotate"); {
		case err == nil:
			taken++
		case strings.Contains(out+err.Error(), "is being changed already"):
			refused++
		default:
			t.Errorf("a change of keys is refused without a reason: %v %s", err, out)
		}
		look()
		time.Sleep(time.Second)
	}
	eventually(t, 90*time.Second, "the last change is over, here and there", func(context.Context) error {
		v, there := view[encryptionView](t, a, "encryption"), look()
		if v.Changes || len(v.Devices) != 1 || v.Devices[0].Key == first || !slices.Equal(there, []string{v.Devices[0].Key}) {
			return fmt.Errorf("host a has %+v, and host b sends to it under %q", v, there)
		}
		return nil
	})
	report := lossless(t, probe)
	// What is asked for before a change has begun may be done with it.
	changes := len(seen) - 1
	if changes < 1 || changes > taken {
		t.Errorf("of %d changes asked for %d were taken and %d refused; host b saw %d", seconds, taken, refused, changes)
	}
	figure(t, "encrypted: another key asked for each second on "+e.name, seconds, "%d taken, %d refused, a peer saw %d changes; %d of %d packets lost (target 0)", taken, refused, changes, report.Lost, report.Sent)
}

// revoke takes the third host out and back.
func (e *encrypted) revoke(t *testing.T) {
	a, b, c := e.lab.Hosts[0], e.lab.Hosts[1], e.lab.Hosts[2]
	from, out := hosts.Container{Host: b, Name: "encr"}, hosts.Container{Host: c, Name: "encr"}
	address := addressOf(t, out, "encr").String()
	reach(t, from, address)
	sees := func(h *hosts.Host) bool {
		for _, p := range view[encryptionView](t, h, "encryption").Peers {
			if p.Host == c.Name {
				return true
			}
		}
		return false
	}
	if text, err := a.Exec(t.Context(), "weft", "encryption", "revoke", c.Name); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	took := eventually(t, 20*time.Second, "host b has dropped host c", func(context.Context) error {
		if sees(b) {
			return errors.New("it has not")
		}
		return nil
	})
	silent(t, from, address)
	silent(t, out, addressOf(t, from, "encr").String())
	tells(t, c, "this host is revoked")
	if text, err := a.Exec(t.Context(), "weft", "encryption", "revoke", "nobody"); err == nil || !strings.Contains(text+err.Error(), "nobody") {
		t.Errorf("a host that is not there is revoked: %s", text)
	}
	if text, err := a.Exec(t.Context(), "weft", "encryption", "restore", c.Name); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	reach(t, from, address)
	figure(t, "encrypted: host revoked on "+e.name, 1, "dropped by the others after %s", took.Round(100*time.Millisecond))
}

func keyOf(t *testing.T, h *hosts.Host) string {
	t.Helper()
	return view[encryptionView](t, h, "encryption").Devices[0].Key
}

// keysOf returns the public keys under which a host sends to another one: two while a key
// changes.
func keysOf(t *testing.T, at, of *hosts.Host) (keys []string) {
	t.Helper()
	for _, p := range view[encryptionView](t, at, "encryption").Peers {
		if p.Host == of.Name {
			keys = append(keys, p.Key)
		}
	}
	return keys
}

type encryptionView struct {
	Devices []struct {
		Name   string
		Key    string
		Module bool
	}
	Peers []struct {
		Host, State, Key string
		Addresses        int
	}
	Changes bool
}
