package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Firewalld is what firewalld drops of our networks whatever rules of ours accept.
type Firewalld struct {
	// Zones: it rejects what our links forward. With its backend nftables its verdict
	// counts beside that of other tables, unless one of its zones has the links or the
	// default zone trusts everybody. The backend iptables asks our rules first.
	Zones bool
	// ReversePath: it drops IPv6 on a bridge on which the host has no route to the
	// sender (IPv6_rpfilter), where br_netfilter shows it frames.
	ReversePath bool
}

// Firewalld reads firewalld's rules.
func (k *Kernel) Firewalld(ctx context.Context) (f Firewalld, err error) {
	// The last rules are those of the default zone.
	zones, last := [][]byte(nil), 1
	if zones, err = k.firewalldRules("filter_FORWARD_ZONES"); err == nil && len(zones) == 0 {
		// From version 2 on zones are beside policies, and what ends a zone is a rule more.
		last = 2
		zones, err = k.firewalldRules("filter_FORWARD_POLICIES")
	}
	if err != nil {
		return f, err
	}
	early, err := k.firewalldRules("filter_PREROUTING")
	if err != nil {
		return f, err
	}
	f.Zones = len(zones) > 0 && !holds(zones, "weft") && !holds(zones[max(0, len(zones)-last):], "_trusted\x00")
	f.ReversePath = holds(early, "fib\x00")
	if !f.ReversePath && k.rules.name() != "" && !ipv6Off() {
		f.ReversePath, err = k.rules.reversePath(ctx)
	}
	return f, err
}

// firewalldRules returns the rules of a chain of firewalld's own table, as the kernel
// writes them.
func (k *Kernel) firewalldRules(chain string) ([][]byte, error) {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETRULE, 0)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.NFPROTO_INET})
	req.AddData(nl.NewRtAttr(unix.NFTA_RULE_TABLE, nl.ZeroTerminated("firewalld")))
	req.AddData(nl.NewRtAttr(unix.NFTA_RULE_CHAIN, nl.ZeroTerminated(chain)))
	rules, err := k.filter.dump(req)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) {
		return nil, nil // no such table, or a kernel without nftables
	}
	if err != nil {
		return nil, fmt.Errorf("read firewalld's rules: %w", err)
	}
	return rules, nil
}

func holds(rules [][]byte, word string) bool {
	return slices.ContainsFunc(rules, func(r []byte) bool { return bytes.Contains(r, []byte(word)) })
}

// reversePath reports whether firewalld's backend iptables has its IPv6 check.
func (r *ruler) reversePath(ctx context.Context) (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rs, err := r.saveLocked(ctx, r.backend, true)
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(rs["mangle"]["PREROUTING"], func(r rule) bool {
		return strings.HasPrefix(r.spec, "-m rpfilter") && strings.HasSuffix(r.spec, "--invert -j DROP")
	}), nil
}
