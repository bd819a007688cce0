package gossip

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/store"
)

// TestAnswersAreLimited: no member makes a host remember more than some megabytes, however
// its answer is made up.
func TestAnswersAreLimited(t *testing.T) {
	service := store.Service{VNI: 1, VIP: netip.MustParseAddr("10.1.0.9")}
	for range 4000 {
		service.Backends = append(service.Backends, netip.MustParseAddr("10.1.0.2"))
	}
	proofs := answer{More: true}
	for i := range 60 {
		proofs.Networks = append(proofs.Networks, versioned{SharedNetwork: store.SharedNetwork{VNI: store.VNI(i + 1), Mode: "vxlan", Proof: make([]byte, 128<<10)}})
	}
	junk := strings.Repeat("x", maxFrame-100)
	for name, c := range map[string]struct {
		part any
		want string
	}{
		"backends of many services": {answer{Services: []store.Service{service, service, service, service}, More: true}, "too many records"},
		"long proofs":               {proofs, "not valid"},
		"frames of unknown fields":  {map[string]any{"junk": junk, "networks": []versioned{{SharedNetwork: store.SharedNetwork{VNI: 1}}}, "more": true}, "over the limit"},
		"empty values":              {map[string]any{"endpoints": make([]struct{}, maxFrame/3-100)}, "too many values"},
	} {
		err := askOf(t, soon, func(conn net.Conn) error {
			for range 40 {
				if err := writeFrame(conn, c.part); err != nil {
					return nil // the other side has enough
				}
			}
			return nil
		})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// TestFetchEnds: an owner that sends a little now and then holds nobody for longer than a
// fetch may take.
func TestFetchEnds(t *testing.T) {
	begin := time.Now()
	err := askOf(t, time.Second, func(conn net.Conn) error {
		part := answer{Networks: []versioned{{SharedNetwork: store.SharedNetwork{VNI: 1}}}, More: true}
		for writeFrame(conn, part) == nil {
			time.Sleep(50 * time.Millisecond)
		}
		return nil
	})
	if took := time.Since(begin); err == nil || took > ioTime/2 {
		t.Errorf("after %v: %v", took, err)
	}
}

// askOf asks an owner that answers by fn, and waits so long.
func askOf(t *testing.T, d time.Duration, fn func(net.Conn) error) error {
	t.Helper()
	client, server := net.Pipe()
	c, o := unrunCluster(t), unrunCluster(t)
	done := make(chan error, 1)
	go func() {
		conn := tls.Server(server, tlsConfig(o.cert, func(store.HostID) error { return nil }))
		var q request
		err := readFrame(conn, maxAsk, &q)
		if err == nil {
			err = fn(conn)
		}
		done <- err
	}()
	st := &stream{conn: tls.Client(client, tlsConfig(c.cert, func(store.HostID) error { return nil })), stop: func() bool { return true }}
	_ = st.conn.SetDeadline(time.Now().Add(soon))
	_, err := st.ask(request{}, time.Now().Add(d))
	_, _ = client.Close(), server.Close()
	if e := <-done; e != nil {
		return fmt.Errorf("the owner failed: %w", e)
	}
	return err
}
