package kernel

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane"
)

const (
	setType = "hash:ip"

	// setBusy is how long Delete waits for the kernel to let go of a set
	// after the last rule that names it is gone: with nftables that happens
	// later, on a work queue.
	setBusy = 2 * time.Second
)

// readSets adds our sets to p. Others may have a name like ours: an operator's own
// "weft-admins", which a rule of his uses.
func (k *Kernel) readSets(p dataplane.Plan) error {
	for _, name := range dataplane.SetNames {
		r, err := k.handle.IpsetList(name)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return fmt.Errorf("list set %s: %w", name, err)
		}
		members, err := setMembers(r)
		if err != nil {
			return err
		}
		o := dataplane.Set{Name: name, V6: r.Family == unix.AF_INET6, Members: strings.Join(members, ",")}
		if r.TypeName != setType {
			o.Members = "(type " + r.TypeName + ")"
		}
		p.Add(o)
	}
	return nil
}

// setMembers returns the members as Set has them: sorted as text.
func setMembers(r *netlink.IPSetResult) ([]string, error) {
	var out []string
	for _, e := range r.Entries {
		a, ok := netip.AddrFromSlice(e.IP)
		if !ok {
			return nil, fmt.Errorf("set %s: the kernel's answer is malformed", r.SetName)
		}
		out = append(out, a.String())
	}
	slices.Sort(out)
	return out, nil
}

func (k *Kernel) applySet(ctx context.Context, verb dataplane.Verb, o dataplane.Set) error {
	if verb == dataplane.Delete {
		return k.deleteSet(ctx, o.Name)
	}
	family := cmp.Or(map[bool]uint8{true: unix.AF_INET6}[o.V6], unix.AF_INET)
	r, err := k.handle.IpsetList(o.Name)
	if errors.Is(err, unix.ENOENT) {
		if err = k.handle.IpsetCreate(o.Name, setType, netlink.IpsetCreateOptions{Family: family}); err == nil {
			r, err = k.handle.IpsetList(o.Name)
		}
	}
	if err != nil {
		return err
	}
	if r.TypeName != setType || r.Family != family {
		return fmt.Errorf("set %s exists with type %s, family %d; remove it (ipset destroy %s)", o.Name, r.TypeName, r.Family, o.Name)
	}
	have, err := setMembers(r)
	if err != nil {
		return err
	}
	want := strings.FieldsFunc(o.Members, func(c rune) bool { return c == ',' })
	// New members first: a peer that is in both is never missing.
	for _, m := range want {
		if !slices.Contains(have, m) {
			err = errors.Join(err, setMember(k.handle.IpsetAdd, o.Name, m, nl.IPSET_ERR_EXIST))
		}
	}
	for _, m := range have {
		if !slices.Contains(want, m) {
			err = errors.Join(err, setMember(k.handle.IpsetDel, o.Name, m, nl.IPSET_ERR_EXIST))
		}
	}
	return err
}

// setMember adds or removes a member; the error done says that it is so already.
func setMember(change func(string, *netlink.IPSetEntry) error, set, member string, done int) error {
	ip := net.ParseIP(member)
	if ip == nil {
		return fmt.Errorf("member %q of set %s is no address", member, set)
	}
	err := change(set, &netlink.IPSetEntry{IP: ip})
	if errors.Is(err, nl.IPSetError(done)) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("member %s of set %s: %w", member, set, err)
	}
	return nil
}

func (k *Kernel) deleteSet(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, setBusy)
	defer cancel()
	for {
		err := k.handle.IpsetDestroy(name)
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, nl.IPSetError(nl.IPSET_ERR_BUSY)) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("set %s is still used by a rule; look for it with: iptables-save | grep %s", name, name)
		case <-time.After(5 * time.Millisecond):
		}
	}
}
