package kernel

import (
	"errors"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane"
)

// deleteLinks removes links of ours. Each removal alone takes some 16 ms of
// waiting in the kernel, and a group of links takes as long as one, so several are
// put into a group of their own first.
func (k *Kernel) deleteLinks(ops []dataplane.Op) []error {
	errs := make([]error, len(ops))
	if len(ops) == 1 {
		errs[0] = k.deleteLink(ops[0].Object.Key().Name)
		return errs
	}
	links, err := k.links()
	if err != nil {
		return fill(errs, err)
	}
	own, groups, index := map[string]bool{}, map[uint32]bool{}, map[string]int32{}
	for _, l := range links {
		own[l.name], index[l.name] = l.ours(), l.index
		groups[l.group] = true
	}
	group := uint32(0x77656674) // "weft"
	for groups[group] {
		group++
	}
	var doomed []string
	for _, op := range ops {
		if name := op.Object.Key().Name; own[name] {
			k.tunnels.end(name)
			doomed = append(doomed, name)
		}
	}
	k.deleteGroup(group, doomed)
	// What the group did not take goes one by one; mostly nothing is left.
	for i, op := range ops {
		if name := op.Object.Key().Name; own[name] {
			if errs[i] = k.deleteLink(name); errs[i] == nil {
				k.forgetPort(index[name])
			}
		}
	}
	return errs
}

// deleteLink removes a link if it is ours. That a stranger has the name is no
// error: ours is not there.
func (k *Kernel) deleteLink(name string) error {
	l, err := k.link(name)
	if errors.Is(err, errNoLink) {
		return nil
	}
	if err != nil {
		return err
	}
	if !l.ours() {
		return nil
	}
	k.tunnels.end(name)
	if err := k.remove(name); err != nil {
		return err
	}
	k.forgetPort(l.index) // now: without it the program guards nothing
	return nil
}

func (k *Kernel) deleteGroup(group uint32, names []string) {
	if len(names) == 0 {
		return // the group would be empty, which the kernel refuses
	}
	var reqs []*nl.NetlinkRequest
	for _, n := range names {
		reqs = append(reqs, change(n, nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(group))))
	}
	req := nl.NewNetlinkRequest(unix.RTM_DELLINK, 0)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(group)))
	k.route.run(append(reqs, req)...)
}

// remove removes a link, whoever's it is.
func (k *Kernel) remove(name string) error {
	req := nl.NewNetlinkRequest(unix.RTM_DELLINK, 0)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	if err := k.route.do(req); !gone(err) {
		return err
	}
	return nil
}
