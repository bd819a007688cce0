package main

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// redirect connects two containers on a Docker network by a pair each, as every driver has
// to, with nothing on the host's sides but a program that gives the other container what
// comes: no guard, no look at who it is for. It bounds what a driver of that kind reaches
// with tc.
func (s *setup) redirect(name, network, link, subnet string) (path, error) {
	pids, err := s.two(link, network)
	if err != nil {
		return path{}, err
	}
	for i, pid := range pids {
		script := fmt.Sprintf("ip link add %[1]s%[2]d type veth peer name %[1]s netns %[3]d; ip link set %[1]s%[2]d up;"+
			"nsenter -t %[3]d -n ip addr add %[4]s.%[2]d/24 dev %[1]s; nsenter -t %[3]d -n ip link set %[1]s up", link, i+1, pid, subnet)
		if _, err := s.a.Exec(s.ctx, "sh", "-ec", script); err != nil {
			return path{}, err
		}
	}
	err = inside(s.a.NetNS(), func() error {
		var index [2]int
		for i := range index {
			l, err := netlink.LinkByName(fmt.Sprint(link, i+1))
			if err != nil {
				return err
			}
			index[i] = l.Attrs().Index
		}
		return errors.Join(giveOn(index[0], index[1]), giveOn(index[1], index[0]))
	})
	return path{name, fmt.Sprintf("/proc/%d/ns/net", pids[0]), fmt.Sprintf("/proc/%d/ns/net", pids[1]), netip.MustParseAddr(subnet + ".2")}, err
}

// giveOn makes the container behind one link get what comes from that behind another.
func giveOn(from, to int) error {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "give_on", Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.Mov.Imm(asm.R2, 0), // PACKET_HOST: the link here has another MAC
		asm.FnSkbChangeType.Call(),
		asm.Mov.Imm(asm.R1, int32(to)),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnRedirectPeer.Call(),
		asm.Return(),
	}})
	if err != nil {
		return err
	}
	defer p.Close()
	qdisc := netlink.QdiscAttrs{LinkIndex: from, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}
	if err := netlink.QdiscAdd(&netlink.GenericQdisc{QdiscAttrs: qdisc, QdiscType: "clsact"}); err != nil {
		return err
	}
	return netlink.FilterAdd(&netlink.BpfFilter{Fd: p.FD(), Name: "give_on", DirectAction: true,
		FilterAttrs: netlink.FilterAttrs{LinkIndex: from, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1}})
}
