package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/ipam"
	"github.com/weftnet/weft/store"
)

// wellSyncer is a kernel that always does as it is told.
type wellSyncer struct{}

func (wellSyncer) Sync(context.Context, store.VNI, store.EndpointID) error { return nil }
func (wellSyncer) Missing(store.VNI) []store.EndpointID                    { return nil }
func (wellSyncer) Untaken(store.VNI) []store.EndpointID                    { return nil }

const (
	testNetwork  = "aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11"
	testEndpoint = "bb11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11"
)

// conversation is a life of requests as both engines send them, in order.
func conversation() []struct{ method, body string } {
	return []struct{ method, body string }{
		{"IpamDriver.RequestPool", `{"AddressSpace":"WeftLocal","Pool":"10.50.0.0/24","SubPool":"10.50.0.128/25","Options":{},"V6":false}`},
		{"IpamDriver.RequestPool", `{"AddressSpace":"WeftLocal","Pool":"","SubPool":"","Options":null,"V6":true}`},
		{"IpamDriver.RequestAddress", `{"PoolID":"WeftLocal/10.50.0.0/24/10.50.0.128/25","Address":"10.50.0.254","Options":{"RequestAddressType":"com.docker.network.gateway"}}`},
		{"IpamDriver.RequestAddress", `{"PoolID":"WeftLocal/10.50.0.0/24/10.50.0.128/25","Address":"","Options":{"com.docker.network.endpoint.name":"web"}}`},
		{"NetworkDriver.CreateNetwork", `{"NetworkID":"` + testNetwork + `","IPv4Data":[{"AddressSpace":"LocalDefault","Pool":"10.50.0.0/24","Gateway":"10.50.0.254/24","AuxAddresses":{"host1":"10.50.0.200/24"}}],"IPv6Data":[],"Options":{"com.docker.network.enable_ipv6":false,"com.docker.network.generic":{"com.docker.network.driver.mtu":"1400"}}}`},
		{"NetworkDriver.CreateEndpoint", `{"NetworkID":"` + testNetwork + `","EndpointID":"` + testEndpoint + `","Interface":{"Address":"10.50.0.177/24","AddressIPv6":"","MacAddress":""},"Options":{"com.docker.network.endpoint.exposedports":[{"Proto":6,"Port":80}],"com.docker.network.portmap":[]}}`},
		{"NetworkDriver.Join", `{"NetworkID":"` + testNetwork + `","EndpointID":"` + testEndpoint + `","SandboxKey":"/run/docker/netns/b7171c1b2260","Options":{}}`},
		{"NetworkDriver.EndpointOperInfo", `{"NetworkID":"` + testNetwork + `","EndpointID":"` + testEndpoint + `"}`},
		{"NetworkDriver.Leave", `{"NetworkID":"` + testNetwork + `","EndpointID":"` + testEndpoint + `"}`},
		{"NetworkDriver.DeleteEndpoint", `{"NetworkID":"` + testNetwork + `","EndpointID":"` + testEndpoint + `"}`},
		{"IpamDriver.ReleaseAddress", `{"PoolID":"WeftLocal/10.50.0.0/24/10.50.0.128/25","Address":"10.50.0.254"}`},
		{"IpamDriver.ReleasePool", `{"PoolID":"WeftLocal/10.50.0.0/24/10.50.0.128/25"}`},
		{"NetworkDriver.DeleteNetwork", `{"NetworkID":"` + testNetwork + `"}`},
		{"NetworkDriver.DiscoverNew", `{"DiscoveryType":1,"DiscoveryData":{"Address":"192.0.2.1","Self":true}}`},
		{"NetworkDriver.GwAllocCheck", `{"Options":{}}`},
	}
}

// realCalls is the mux on the real driver and IPAM, with a database in a folder of
// the test.
func realCalls(t testing.TB) (http.Handler, *store.DB) {
	t.Helper()
	db, err := store.Open(filepath.Join(t.TempDir(), databaseFile), store.Host{ID: "self", Name: "alpha", DataPort: defaultDataPort})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	log := slog.New(slog.DiscardHandler)
	g := newGate()
	g.open(&services{db: db, ipam: ipam.New(db, ipam.Config{}), driver: driver.New(driver.Config{DB: db, Sync: wellSyncer{}, Log: log,
		Routes: func(context.Context) ([]driver.Route, error) { return nil, nil },
		VXLANs: func(context.Context) ([]driver.VXLAN, error) { return nil, nil }})})
	s := &server{gate: g, metrics: newMetrics(newGate()), log: log, limit: callLimit}
	return s.handler(testProcess().routes()), db
}

// records returns all that a call may change, as text.
func records(t testing.TB, db *store.DB) string {
	t.Helper()
	var out bytes.Buffer
	err := db.View(func(tx *store.Tx) error {
		nets, err := tx.Networks()
		if err != nil {
			return err
		}
		eps, err := tx.AllEndpoints()
		if err != nil {
			return err
		}
		pools, err := tx.Pools()
		if err != nil {
			return err
		}
		all := []any{nets, eps, pools}
		for _, p := range pools {
			leases, err := tx.Leases(p.ID)
			if err != nil {
				return err
			}
			all = append(all, leases)
		}
		return json.NewEncoder(&out).Encode(all)
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func post(h http.Handler, method string, body []byte) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/"+method, bytes.NewReader(body)))
	return w
}

func errOf(t testing.TB, method string, body []byte, w *httptest.ResponseRecorder) string {
	t.Helper()
	var reply errorReply
	if err := json.Unmarshal(w.Body.Bytes(), &reply); err != nil {
		t.Fatalf("%s %q: answer %q is not JSON: %v", method, body, w.Body, err)
	}
	return reply.Err
}

func TestConversationIsServed(t *testing.T) {
	h, db := realCalls(t)
	before := records(t, db)
	for _, c := range conversation() {
		if w := post(h, c.method, []byte(c.body)); w.Code != 200 || errOf(t, c.method, []byte(c.body), w) != "" {
			t.Errorf("%s: %d %s", c.method, w.Code, w.Body)
		}
	}
	// The pool that was chosen automatically stays, with nothing else.
	after := records(t, db)
	if before == after || strings.Contains(after, testNetwork) || strings.Contains(after, "10.50.0") {
		t.Errorf("records after the conversation: %s", after)
	}
}

// A request that is cut anywhere, or has a value of another type anywhere, is
// refused and changes nothing, whatever the state.
func TestCutAndMistypedRequestsChangeNothing(t *testing.T) {
	h, db := realCalls(t)
	for _, c := range conversation() {
		before := records(t, db)
		atOnce := strings.HasSuffix(c.method, "OperInfo") || strings.HasSuffix(c.method, "DiscoverNew") || strings.HasSuffix(c.method, "GwAllocCheck")
		for cut := range len(c.body) {
			body := []byte(c.body[:cut])
			if w := post(h, c.method, body); !atOnce && errOf(t, c.method, body, w) == "" {
				t.Errorf("%s cut at byte %d: accepted", c.method, cut)
			}
		}
		var fields map[string]json.RawMessage
		if err := json.Unmarshal([]byte(c.body), &fields); err != nil {
			t.Fatal(err)
		}
		for name, old := range fields {
			fields[name] = json.RawMessage(`[[7]]`)
			body, err := json.Marshal(fields)
			if err != nil {
				t.Fatal(err)
			}
			if w := post(h, c.method, body); !atOnce && !strings.Contains(errOf(t, c.method, body, w), name) {
				t.Errorf("%s with a wrong %s: %d %s", c.method, name, w.Code, w.Body)
			}
			fields[name] = old
		}
		if after := records(t, db); after != before {
			t.Fatalf("%s: records changed from %s to %s", c.method, before, after)
		}
		if w := post(h, c.method, []byte(c.body)); errOf(t, c.method, []byte(c.body), w) != "" {
			t.Errorf("%s: %s", c.method, w.Body)
		}
	}
}

// FuzzCalls sends one body of any kind after a prefix of a real conversation: the
// answer is JSON, and an error has changed nothing.
func FuzzCalls(f *testing.F) {
	for i, c := range conversation() {
		f.Add(uint8(i), uint8(i), []byte(c.body))
		f.Add(uint8(i), uint8(i+1), []byte(c.body)) // repeated
	}
	for i, body := range []string{``, `null`, `{}`, `{"NetworkID":null}`, `{"NetworkID":"../../etc"}`, "{\"NetworkID\":\"\xff\"}", `{"Interface":null}`, `{"PoolID":"WeftLocal/0.0.0.0/0","Address":"::ffff:1.2.3.4"}`} {
		f.Add(uint8(i), uint8(6), []byte(body))
	}
	f.Fuzz(func(t *testing.T, which, after uint8, body []byte) {
		h, db := realCalls(t)
		all := conversation()
		for _, c := range all[:int(after)%(len(all)+1)] {
			post(h, c.method, []byte(c.body))
		}
		method := all[int(which)%len(all)].method
		before := records(t, db)
		w := post(h, method, body)
		if text := errOf(t, method, body, w); text != "" || w.Code != 200 {
			if len(text) > 64<<10 {
				t.Errorf("%s: the error has %d bytes", method, len(text))
			}
			if now := records(t, db); now != before {
				t.Errorf("%s %q answered %d %q and changed\n%s to\n%s", method, body, w.Code, text, before, now)
			}
		}
	})
}

func TestRecoveredRecordsHangTogether(t *testing.T) {
	_, db := realCalls(t)
	nets := []store.Network{{ID: "n1", VNI: 4096, Mode: "vxlan"}}
	eps := []store.Endpoint{{ID: "e1", Network: "n1", VNI: 4096, Sandbox: "?"}, {ID: "e2", Network: "n2", VNI: 4097}, {ID: "e3", Network: "n1", VNI: 5000}}
	restored := 0
	if err := db.Update(t.Context(), func(tx *store.Tx) (err error) { restored, err = putRecovered(tx, nets, eps); return err }); err != nil {
		t.Fatal(err)
	}
	var got []string
	if err := db.View(func(tx *store.Tx) error {
		all, err := tx.AllEndpoints()
		for _, e := range all {
			got = append(got, string(e.ID))
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if restored != 1 || fmt.Sprint(got) != "[e1]" {
		t.Errorf("restored %d: %v, want e1 alone", restored, got)
	}
}
