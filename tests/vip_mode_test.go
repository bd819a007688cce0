package tests

import (
	"fmt"
	"testing"
)

// modes asks services on networks of the other modes: their packets go into no bridge.
func (v *vips) modes(t *testing.T) {
	for i, mode := range []string{"mode=routed", "encrypted"} {
		s := &vips{swarm: v.swarm}
		network := fmt.Sprint("other", i) // Docker removes the one before when it comes to it
		s.network(t, network, 61+i, "-o", mode)
		s.service(t, "there", 3, "--network", network, "--endpoint-mode", "vip")
		s.address = s.virtual(t, "there")
		for _, h := range s.lab.Hosts {
			c := run(t, h, "asks", "--network", network)
			s.clients = append(s.clients, c)
			s.balanced(t, c, 3)
			reach(t, c, s.address.String())
		}
		figure(t, "VIP with "+mode, 3*60, "answered from every host, by all tasks")
		for _, c := range s.clients {
			docker(t, c.Host, "rm", "-f", "asks")
		}
		s.removeServices(t, "there")
		s.removeNetworks(t, network)
	}
}
