package tests

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// stranger makes host c, outside the Swarm, claim a network of it and an address of a
// task, without the network's key and with a wrong one; replays what it said of itself
// before, and lies about versions.
func (s *swarmInput) stranger(t *testing.T) {
	const vni = 7900
	s.leaves(t)
	configure(t, s.c, "WEFT_SCOPE=local", "WEFT_JOIN="+s.a.Address.String())
	meets(t, s.c, 2)
	// An honest plugin refuses to claim what it knows to have a key.
	if err := s.lab.Underlay.Cut(t.Context(), s.c); err != nil {
		t.Fatal(err)
	}
	forge := []string{"network", "create", "-d", hosts.PluginName, "--subnet", "10.89.0.0/16", "-o", "vni=" + strconv.Itoa(vni)}
	docker(t, s.c, append(slices.Clone(forge), "forged")...)
	s.network(t, "claimed", 89, "-o", "vni="+strconv.Itoa(vni))
	web := s.service(t, "web", 4, "--network", "claimed")
	if err := s.lab.Underlay.Heal(t.Context(), s.c); err != nil {
		t.Fatal(err)
	}
	meets(t, s.c, 2)
	for _, key := range []string{"none", "wrong"} {
		if key == "wrong" {
			docker(t, s.c, "rm", "--force", "thief", "spy")
			docker(t, s.c, "network", "rm", "forged")
			docker(t, s.c, append(slices.Clone(forge), "-o", "weft.key="+wrongKey, "forged")...)
		}
		victim := onHost(web, s.b)[0].Addresses["claimed"]
		run(t, s.c, "thief", "--network", "forged", "--ip", victim.String())
		spy := run(t, s.c, "spy", "--network", "forged", "--ip", "10.89.200.1")
		for _, h := range []*hosts.Host{s.a, s.b} {
			says(t, h, []string{fmt.Sprintf("network %d has subnets [10.89.0.0/16] here, but others on host c (another key, or none)", vni), "WEFT_SCOPE differs: c"})
		}
		meets(t, s.a, 2)
		silent(t, spy, onHost(web, s.a)[0].Addresses["claimed"].String())
		s.mesh(t, "claimed", web)
		s.unbelieved(t, vni, len(web))
		figure(t, "swarm: a stranger with key "+key+" claims a network and an address on "+s.name, 1, "its endpoints and packets are taken by nobody, it is told nothing, and weft status names it")
	}
	t.Run("replayed", s.replayed)
	t.Run("versions", func(t *testing.T) { s.lies(t, vni) })
	s.mesh(t, "claimed", web)
	s.unbelieved(t, vni, len(web))
	docker(t, s.c, "rm", "--force", "thief", "spy")
	docker(t, s.c, "network", "rm", "forged")
	s.removeServices(t, "web")
	s.removeNetworks(t, "claimed")
	configure(t, s.c, "WEFT_SCOPE=global", "WEFT_JOIN=")
	if err := s.c.JoinSwarm(t.Context(), s.a, hosts.Worker); err != nil {
		t.Fatal(err)
	}
	s.forgotten(t)
	says(t, s.a, nil)
}

// unbelieved fails unless hosts a and b know n endpoints of the network, all of
// theirs, and take no packet from c, which knows none of them.
func (s *swarmInput) unbelieved(t *testing.T, vni, n int) {
	t.Helper()
	for _, h := range s.lab.Hosts {
		known, wrong := 0, 0
		all := view[[]endpointView](t, h, "endpoints")
		for _, e := range all {
			if e.VNI != vni {
				continue
			}
			if known++; (e.Host == s.c.Name) != (h == s.c) {
				wrong++
			}
		}
		if wrong > 0 || h != s.c && known != n {
			t.Errorf("host %s knows %+v", h.Name, all)
		}
	}
	for _, h := range []*hosts.Host{s.a, s.b} {
		if all := s.letIn(t, h); slices.Contains(all, s.c.Address) || len(all) != 1 {
			t.Errorf("host %s lets in %v", h.Name, all)
		}
	}
}

// letIn returns the addresses from which a host takes packets of networks.
func (s *swarmInput) letIn(t *testing.T, h *hosts.Host) (all []netip.Addr) {
	t.Helper()
	out, err := h.Exec(t.Context(), "ipset", "save", "weft-peers4")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(out, "\n") {
		if words := strings.Fields(line); len(words) == 3 && words[0] == "add" {
			all = append(all, netip.MustParseAddr(words[2]))
		}
	}
	return all
}

const gossipPort = 4796

// send sends UDP packets from outside all hosts to the gossip port of one.
func (s *swarmInput) send(t *testing.T, to *hosts.Host, packets ...[]byte) {
	t.Helper()
	err := hosts.InNetNS("/run/netns/"+s.lab.Underlay.Namespace, func() error {
		conn, err := net.Dial("udp", netip.AddrPortFrom(to.Address, gossipPort).String())
		if err != nil {
			return err
		}
		defer func() { _ = conn.Close() }()
		for _, p := range packets {
			if _, err := conn.Write(p); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// dropped is how many messages a host has refused for the reason.
func dropped(t *testing.T, h *hosts.Host, reason string) float64 {
	t.Helper()
	raw, err := ask(t.Context(), h, "weft-admin.sock", http.MethodGet, "/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("weft_drops_total{reason=%q}", reason)
	if !strings.Contains(string(raw), name) {
		return 0
	}
	return metric(t, h, name)
}

// replayed repeats what host c said of itself before its plugin started anew.
func (s *swarmInput) replayed(t *testing.T) {
	restart := func() {
		t.Helper()
		old, err := s.c.KillPlugin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := served(t.Context(), s.c, old); err != nil {
			t.Fatal(err)
		}
		meets(t, s.c, 2)
		meets(t, s.a, 2)
	}
	capture, err := s.lab.Underlay.Capture(t.Context(), s.c, fmt.Sprintf("udp and src host %s and dst port %d", s.c.Address, gossipPort))
	if err != nil {
		t.Fatal(err)
	}
	restart()
	eventually(t, 20*time.Second, "some gossip is captured", func(context.Context) error {
		st, err := os.Stat(capture.File)
		if err == nil && st.Size() < 2000 {
			err = fmt.Errorf("the file has %d bytes", st.Size())
		}
		return err
	})
	if _, err := capture.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	restart()
	packets := payloads(t, capture.File)
	before := dropped(t, s.a, "old-record")
	eventually(t, 30*time.Second, "the replayed records are refused", func(context.Context) error {
		s.send(t, s.a, packets...)
		if dropped(t, s.a, "old-record") == before {
			return fmt.Errorf("none of %d packets is", len(packets))
		}
		return nil
	})
	meets(t, s.a, 2)
	figure(t, "swarm: a host's former gossip replayed on "+s.name, len(packets), "%.0f former records refused and counted; all hosts stay in sync", dropped(t, s.a, "old-record")-before)
}

// payloads reads the UDP packets of a pcap file: a header of 24 bytes, then 16 bytes
// before each frame, with its length in the third word.
func payloads(t *testing.T, file string) (all [][]byte) {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for raw = raw[24:]; len(raw) > 16; {
		n := 16 + int(binary.LittleEndian.Uint32(raw[8:]))
		const before = 14 + 20 + 8 // Ethernet, IPv4 without options, UDP
		all = append(all, raw[16+before:n])
		raw = raw[n:]
	}
	return all
}

// lies tells host a of versions that host b does not have.
func (s *swarmInput) lies(t *testing.T, vni uint32) {
	self := view[struct {
		Host struct {
			ID    string
			Epoch uint64
		}
	}](t, s.b, "status").Host
	id, err := hex.DecodeString(self.ID)
	if err != nil {
		t.Fatal(err)
	}
	var packets [][]byte
	for i := range 100 {
		for _, v := range []uint32{0, vni} {
			// A memberlist packet: label, message of a user, digest (store/gossip/digest.go).
			p := append([]byte{244, 6}, "weft 1\x08\x01"...)
			p = binary.BigEndian.AppendUint32(append(p, id...), v)
			p = binary.BigEndian.AppendUint64(p, self.Epoch)
			packets = append(packets, binary.BigEndian.AppendUint64(p, 1<<63+uint64(i)))
		}
	}
	fetches := metric(t, s.a, "weft_fetches_total")
	s.send(t, s.a, packets...)
	eventually(t, 20*time.Second, "host a asks host b", func(context.Context) error {
		if now := metric(t, s.a, "weft_fetches_total"); now == fetches {
			return errors.New("it did not")
		}
		return nil
	})
	meets(t, s.a, 2)
	figure(t, "swarm: digests with versions that nobody has on "+s.name, len(packets), "%.0f questions to the owner, whose word counts; all stay in sync", metric(t, s.a, "weft_fetches_total")-fetches)
}
