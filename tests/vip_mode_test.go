package tests

import "testing"

// modes asks services on networks of the other modes: their packets go into no bridge.
func (v *vips) modes(t *testing.T) {
	for i, mode := range []string{"mode=routed", "encrypted"} {
		s := &vips{swarm: v.swarm}
		s.network(t, "other", 61+i, "-o", mode)
		s.service(t, "there", 3, "--network", "other", "--endpoint-mode", "vip")
		s.address = s.virtual(t, "there")
		for _, h := range s.lab.Hosts {
			c := run(t, h, "asks", "--network", "other")
			s.clients = append(s.clients, c)
			s.balanced(t, c, 3)
			reach(t, c, s.address.String())
		}
		figure(t, "VIP with "+mode, 3*60, "answered from every host, by all tasks")
		for _, c := range s.clients {
			docker(t, c.Host, "rm", "-f", "asks")
		}
		s.removeServices(t, "there")
		s.removeNetworks(t, "other")
	}
}
