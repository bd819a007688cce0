package kernel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-iptables/iptables"

	"github.com/weftnet/weft/dataplane"
)

// The backends of iptables.
const (
	nft    = "nft"
	legacy = "legacy"
)

// checkEvery is how often a Read asks again which backend Docker uses.
const checkEvery = 10 * time.Second

// tools are the programs of one backend, by family (true: IPv6).
type tools struct{ single, save, restore map[bool]string }

// backendCheck is the last look at both backends.
type backendCheck struct {
	at    time.Time
	stale []dataplane.Chain // chains of ours in the backend that is not in use
}

func newRuler(setting string, log *slog.Logger) (*ruler, error) {
	r := &ruler{log: log, setting: setting, tools: map[string]tools{}, ipv6Off: ipv6Off, noV6: dataplane.Plan{}}
	var missing error
	for _, b := range []string{nft, legacy} {
		t := tools{map[bool]string{}, map[bool]string{}, map[bool]string{}}
		var err error
		for v6, name := range map[bool]string{false: "iptables-", true: "ip6tables-"} {
			err = errors.Join(err, find(t.single, v6, name+b), find(t.save, v6, name+b+"-save"), find(t.restore, v6, name+b+"-restore"))
		}
		if err == nil {
			r.tools[b] = t
		}
		missing = errors.Join(missing, err)
	}
	switch setting {
	case nft, legacy:
		if _, ok := r.tools[setting]; !ok {
			return nil, fmt.Errorf("iptables backend %s: %w", setting, missing)
		}
	case "auto":
		if len(r.tools) == 0 {
			return nil, fmt.Errorf("iptables: %w", missing)
		}
	default:
		return nil, fmt.Errorf("iptables backend %q is not known; use auto, nft or legacy", setting)
	}
	return r, nil
}

func find(into map[bool]string, v6 bool, name string) error {
	path, err := exec.LookPath(name)
	for _, dir := range []string{"/usr/sbin/", "/sbin/"} {
		if err != nil {
			path, err = exec.LookPath(dir + name)
		}
	}
	into[v6] = path
	return err
}

// detectLocked decides the backend, at most every ten seconds: Docker's, whose
// verdicts ours must come before. Where both hold rules of Docker, as after a
// switch, the one in use stays; where none does, nft is preferred. Legacy tables
// are not looked at unless they exist, since looking would make them.
func (r *ruler) detectLocked(ctx context.Context) error {
	if r.backend != "" && time.Since(r.checked.at) < checkEvery {
		return nil
	}
	rules := map[string]map[bool]ruleset{}
	var failed error
	for b := range r.tools {
		if b == legacy && !legacyExists() {
			continue
		}
		rules[b] = map[bool]ruleset{}
		for _, v6 := range []bool{false, true} {
			if v6 && r.ipv6Off() {
				continue
			}
			rs, err := r.saveLocked(ctx, b, v6)
			if err != nil {
				failed = errors.Join(failed, err)
				delete(rules, b)
				break
			}
			rules[b][v6] = rs
		}
	}
	chosen, err := r.choose(rules, failed)
	if err != nil {
		return err
	}
	if r.backend != chosen {
		r.log.Info("iptables backend chosen", "backend", chosen, "before", r.backend)
	}
	r.backend = chosen
	r.checked = backendCheck{at: time.Now()}
	other := map[string]string{nft: legacy, legacy: nft}[chosen]
	for v6, rs := range rules[other] {
		for table, chains := range rs {
			for name := range chains {
				if strings.HasPrefix(name, chainPrefix) {
					r.checked.stale = append(r.checked.stale, dataplane.Chain{Table: table + "@" + other, V6: v6, Name: name})
				}
			}
		}
	}
	return nil
}

// choose returns the backend to use. rules holds those that can be read.
func (r *ruler) choose(rules map[string]map[bool]ruleset, failed error) (string, error) {
	if r.setting != "auto" {
		return r.setting, nil
	}
	order := []string{nft, legacy}
	if r.backend == legacy {
		order = []string{legacy, nft}
	}
	for _, b := range order {
		if hasDocker(rules[b][false]) {
			return b, nil
		}
	}
	if _, works := rules[r.backend]; works {
		return r.backend, nil
	}
	if _, works := rules[nft]; works {
		return nft, nil
	}
	if _, installed := r.tools[legacy]; installed {
		return legacy, nil
	}
	return "", failed
}

// hasDocker reports whether Docker keeps its chains here.
func hasDocker(rs ruleset) bool {
	for _, name := range []string{"DOCKER-USER", "DOCKER-FORWARD", "DOCKER"} {
		if _, ok := rs["filter"][name]; ok {
			return true
		}
	}
	return false
}

// legacyExists reports whether the legacy backend has any table here.
func legacyExists() bool {
	for _, name := range []string{"ip_tables_names", "ip6_tables_names"} {
		if b, err := os.ReadFile("/proc/thread-self/net/" + name); err == nil && len(b) > 0 {
			return true
		}
	}
	return false
}

// ipv6Off reports whether the kernel runs without IPv6 (ipv6.disable=1).
func ipv6Off() bool {
	_, err := os.Stat("/proc/thread-self/net/if_inet6")
	return errors.Is(err, os.ErrNotExist)
}

// sweepLocked removes a chain of ours, with the jumps to it, from the backend that
// is not in use.
func (r *ruler) sweepLocked(backend string, op dataplane.Op) error {
	c, ok := op.Object.(dataplane.Chain)
	if !ok || op.Verb != dataplane.Delete {
		return fmt.Errorf("backend %s is not in use; nothing is made there", backend)
	}
	proto := iptables.ProtocolIPv4
	if c.V6 {
		proto = iptables.ProtocolIPv6
	}
	ipt, err := iptables.New(iptables.IPFamily(proto), iptables.Timeout(5), iptables.Path(r.tools[backend].single[c.V6]))
	if err != nil {
		return err
	}
	table, _, _ := strings.Cut(c.Table, "@")
	chains, err := ipt.ListChains(table)
	if err != nil {
		return err
	}
	if !slices.Contains(chains, c.Name) {
		return nil
	}
	for _, from := range chains {
		rules, err := ipt.List(table, from)
		if err != nil {
			return err
		}
		for _, line := range rules {
			spec, isRule := strings.CutPrefix(line, "-A "+from+" ")
			if !isRule || target(spec) != c.Name {
				continue
			}
			if err := ipt.Delete(table, from, splitWords(spec)...); err != nil {
				return err
			}
		}
	}
	if err := ipt.ClearAndDeleteChain(table, c.Name); err != nil {
		return err
	}
	r.checked.stale = slices.DeleteFunc(r.checked.stale, func(s dataplane.Chain) bool { return s == c })
	return nil
}
