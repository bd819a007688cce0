package kernel

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/weftnet/weft/dataplane"
)

const (
	chainPrefix  = "WEFT-"
	dockerPrefix = "DOCKER"

	// jumpComment marks our rules in shared chains.
	jumpComment = "weft"

	// broken is the hash of a chain whose rules are not ours, complete and in
	// order.
	broken = "broken"
)

// ruler reads and writes iptables rules. Chain.Table names a table of the backend
// in use; "filter@legacy" one of the other backend, which Read reports when chains
// of ours were left there, and in which everything is only deleted.
type ruler struct {
	log     *slog.Logger
	setting string
	tools   map[string]tools // by backend; one that is not installed is missing
	ipv6Off func() bool      // the kernel runs without IPv6

	mu      sync.Mutex // guards what follows
	backend string     // "" before the first detection
	checked backendCheck
	// seen are our rules at the last look, of Read or of Watch; nil after they
	// were changed by us. Watch tells what differs.
	seen dataplane.Plan
	// users counts the rules of DOCKER-USER at the last look.
	users int
	// noV6 holds v6 objects that were put on a host whose kernel has IPv6
	// off. There is nothing to guard there, so they count as done.
	noV6 dataplane.Plan
}

func (r *ruler) name() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.backend
}

// rule is one rule as iptables-save prints it, behind "-A CHAIN ".
type rule struct {
	spec   string
	target string // only of rules that name a chain of ours or Docker's
}

// ruleset is what iptables-save printed: table, chain, rules.
type ruleset map[string]map[string][]rule

// parseRules reads the output of iptables-save. Only the tables that we use are
// kept.
func parseRules(out string) (ruleset, error) {
	rs := ruleset{}
	var table map[string][]rule
	for line := range strings.SplitSeq(out, "\n") {
		switch {
		case strings.HasPrefix(line, "*"):
			table = nil
			if name := line[1:]; name == "raw" || name == "nat" || name == "filter" || name == "mangle" {
				table = map[string][]rule{}
				rs[name] = table
			}
		case strings.HasPrefix(line, "#") && strings.Contains(line, "is incompatible, use 'nft' tool"):
			if strings.Contains(line, "`raw'") || strings.Contains(line, "`filter'") {
				return nil, fmt.Errorf("another program keeps rules where iptables has its own: %s", strings.TrimPrefix(line, "# "))
			}
		case table == nil:
		case strings.HasPrefix(line, ":"):
			name, _, _ := strings.Cut(line[1:], " ")
			table[name] = nil
		case strings.HasPrefix(line, "-A "):
			chain, spec, _ := strings.Cut(line[3:], " ")
			table[chain] = append(table[chain], rule{spec, target(spec)})
		}
	}
	return rs, nil
}

// target returns the chain that a rule jumps or goes to, if it may be one of ours
// or Docker's.
func target(spec string) string {
	if !strings.Contains(spec, chainPrefix) && !strings.Contains(spec, dockerPrefix) {
		return ""
	}
	words := splitWords(spec)
	for i, w := range words[:max(len(words)-1, 0)] {
		if w == "-j" || w == "-g" {
			return words[i+1]
		}
	}
	return ""
}

// splitWords splits a rule at blanks outside of double quotes, in which a
// backslash escapes.
func splitWords(s string) []string {
	var out []string
	var word strings.Builder
	quoted, escaped := false, false
	for _, c := range s {
		switch {
		case escaped:
			word.WriteRune(c)
			escaped = false
		case c == '\\' && quoted:
			escaped = true
		case c == '"':
			quoted = !quoted
		case c == ' ' && !quoted:
			out = append(out, word.String())
			word.Reset()
		default:
			word.WriteRune(c)
		}
	}
	return append(out, word.String())
}

// jumpSpec is a jump of ours as iptables-save prints it.
func jumpSpec(to string) string { return "-m comment --comment " + jumpComment + " -j " + to }

// ruleComment is the comment of rule i of n (from 1) in a chain of ours.
func ruleComment(hash string, i, n int) string { return fmt.Sprintf("weft %s %d/%d", hash, i, n) }

var commentPattern = regexp.MustCompile(`--comment "weft ([0-9a-f]+) (\d+)/(\d+)"`)

// chainHash returns the hash that all rules of a chain carry if they are complete
// and in order. A chain without rules has the hash of none.
func chainHash(table string, v6 bool, name string, rules []rule) string {
	if len(rules) == 0 {
		return dataplane.NewChain(table, v6, name).Hash
	}
	hash := ""
	for i, r := range rules {
		m := commentPattern.FindStringSubmatch(r.spec)
		if m == nil || m[2] != strconv.Itoa(i+1) || m[3] != strconv.Itoa(len(rules)) || hash != "" && m[1] != hash {
			return broken
		}
		hash = m[1]
	}
	return hash
}

// inPlace reports whether rules hold exactly one jump to a chain of ours, in front
// or behind nothing but jumps to chains of ours or those of Docker's that accept nothing,
// and behind that to the user's.
func inPlace(rules []rule, to string) bool {
	at, n := -1, 0
	for i, r := range rules {
		if r.target == to {
			at, n = i, n+1
		}
	}
	return n == 1 && rules[at].spec == jumpSpec(to) && !slices.ContainsFunc(rules[:at], isUsers) && at > usersJump(rules)
}

// isUsers reports whether a rule is neither a jump of ours nor one of Docker's that
// accepts nothing. Docker puts its jumps first whenever it starts: what its bridges send
// anywhere it accepts in DOCKER-FORWARD (since 28), and ports of Swarm, to whomever, in
// DOCKER-INGRESS.
func isUsers(r rule) bool {
	switch r.target {
	case "DOCKER-FORWARD", "DOCKER-INGRESS":
		return true
	}
	return !strings.HasPrefix(r.target, dockerPrefix) && !strings.HasPrefix(r.target, chainPrefix)
}

// usersJump returns the place of the jump to the chain that Docker leaves to the user,
// if nothing that accepts is before it, or -1. What the user has there
// goes before what we accept.
func usersJump(rules []rule) int {
	at := slices.IndexFunc(rules, func(r rule) bool { return r.target == "DOCKER-USER" })
	if at >= 0 && slices.ContainsFunc(rules[:at], isUsers) {
		return -1
	}
	return at
}

// add adds the chains and jumps of ours to p.
func (rs ruleset) add(p dataplane.Plan, v6 bool) {
	for table, chains := range rs {
		for name, rules := range chains {
			if strings.HasPrefix(name, chainPrefix) {
				p.Add(dataplane.Chain{Table: table, V6: v6, Name: name, Hash: chainHash(table, v6, name, rules)})
				continue
			}
			for _, r := range rules {
				if strings.HasPrefix(r.target, chainPrefix) && inPlace(rules, r.target) {
					p.Add(dataplane.Jump{Table: table, V6: v6, From: name, To: r.target})
				}
			}
		}
	}
}

// read adds the rules of ours to p.
func (r *ruler) read(ctx context.Context, p dataplane.Plan) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.detectLocked(ctx); err != nil {
		return err
	}
	rules, err := r.readLocked(ctx)
	if err != nil {
		return err
	}
	r.seen = rules
	maps.Copy(p, rules)
	if r.ipv6Off() {
		maps.Copy(p, r.noV6)
	}
	for _, c := range r.checked.stale {
		p.Add(c)
	}
	return nil
}

// readLocked returns the chains and jumps of ours in the backend in use.
func (r *ruler) readLocked(ctx context.Context) (dataplane.Plan, error) {
	p := dataplane.Plan{}
	r.users = 0
	for _, v6 := range []bool{false, true} {
		if v6 && r.ipv6Off() {
			continue
		}
		rs, err := r.saveLocked(ctx, r.backend, v6)
		if err != nil {
			return nil, err
		}
		rs.add(p, v6)
		for _, rule := range rs["filter"]["DOCKER-USER"] {
			if rule.spec != "-j RETURN" {
				r.users++
			}
		}
	}
	return p, nil
}

// changed reports whether our rules are others than at the last look. The objects
// are compared, and not their text, which does not tell the rules of a chain that
// was read.
func (r *ruler) changed(ctx context.Context) (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p, err := r.readLocked(ctx)
	if err != nil || r.seen != nil && maps.Equal(p, r.seen) {
		return false, err
	}
	r.seen = p
	return true, nil
}

// saveLocked returns the rules of a backend.
func (r *ruler) saveLocked(ctx context.Context, backend string, v6 bool) (ruleset, error) {
	t, ok := r.tools[backend]
	if !ok {
		return nil, fmt.Errorf("iptables with the %s backend is not installed", backend)
	}
	out, err := run(ctx, t.save[v6], "")
	if err != nil {
		return nil, err
	}
	return parseRules(out)
}
