package main

import (
	"slices"
	"testing"
)

// A name goes before the beginning of an id; an empty one is nobody's, also where
// hosts were forgotten and have none.
func TestHostIsCalled(t *testing.T) {
	hosts := []revokedReply{{ID: "c0ffee", Name: "a"}, {ID: "beef", Name: "c"}, {ID: "be11", Name: "d"}, {ID: "dead"}, {ID: "f00d", Name: "twin"}, {ID: "fade", Name: "twin"}}
	for host, want := range map[string][]string{
		"c": {"beef"}, "c0": {"c0ffee"}, "be": {"beef", "be11"}, "dead": {"dead"}, "d": {"be11"}, "de": {"dead"}, "twin": {"f00d", "fade"}, "x": nil,
	} {
		var got []string
		for _, h := range called(hosts, host) {
			got = append(got, string(h.ID))
		}
		if !slices.Equal(got, want) {
			t.Errorf("%q is %v, want %v", host, got, want)
		}
	}
	if got := called(hosts, ""); got != nil {
		t.Errorf("nothing is %v", got)
	}
}
